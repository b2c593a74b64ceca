"""What no way can serve: models whose tokens see later ones, or that read another text beside their own."""

from __future__ import annotations

from torch import nn

from .. import verification
from ..errors import PadfreeError
from ..models import pretrained_modules


def check_decoder(model: nn.Module) -> None:
    """Raises PadfreeError for an encoder, an encoder-decoder or any model that is not causal, with what was found."""
    check_reads_one_text(model)
    who = _described(model)
    try:
        seen = verification.sees_later_tokens(model)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(
            f"{who} fails without padfree_patch too, on an ordinary call with one example: {error!r}. So it could not "
            "be checked. Make such a call work first"
        ) from error
    if seen is not None:
        raise PadfreeError(
            f"{who} is not causal: alone and unpatched, an example's first tokens change by {seen:.2g} when a later "
            "one does. Packed attention is causal; train it on padded batches"
        )


def check_reads_one_text(model: nn.Module) -> None:
    """Raises PadfreeError for an encoder-decoder. Runs nothing."""
    outermost = pretrained_modules(model)[0]
    if getattr(outermost.config, "is_encoder_decoder", False):
        raise PadfreeError(
            f"{_described(model)} is an encoder-decoder (is_encoder_decoder of its config is True): its decoder reads "
            "another text, of which a packed row would have several; train it on padded batches"
        )


def _described(model: nn.Module) -> str:
    outermost = pretrained_modules(model)[0]
    return f"{type(outermost).__name__} (model type {outermost.config.model_type!r})"
