"""Rows with images or sounds: exact where their features take the place of tokens, refused by name elsewhere."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import PadfreeError
from ..upstream import Arguments
from .way import parameter_names

_OTHER_INPUTS = ("pixel", "image", "video", "audio", "vision", "features")
"""In the names of arguments that are no text."""


def check_other_inputs(model: nn.Module, arguments: Arguments) -> None:
    """Raises PadfreeError for a packed row with images in a model where these do more than take a token's place."""
    given = [
        name
        for name, value in arguments.items()
        if isinstance(value, (Tensor, list)) and any(part in name for part in _OTHER_INPUTS)
    ]
    if given and (why := _what_they_do(model)):
        raise PadfreeError(
            f"{type(model).__name__}: a packed row with {', '.join(given)}: {why}, which padfree_patch can't do for "
            "each example of a row. Pack text alone, or train examples with images on padded batches"
        )


def _what_they_do(model: nn.Module) -> str | None:
    """Says what images do in a model beside taking the place of tokens; None if that is all."""
    if any(hasattr(each, "get_rope_index") for each in model.modules()):
        return "it works out positions on three axes from all images of the row (get_rope_index)"
    names = {name for each in model.modules() for name in parameter_names(each)}
    if "cross_attention_mask" in names or "cross_attention_states" in names:
        return "its text attends to images by cross-attention"
    if any("token_type_ids" in name for name in names):
        return "tokens of an image see each other, later ones too (token_type_ids)"
    if not any(hasattr(each, "get_placeholder_mask") for each in model.modules()):
        return "how images come into its text is not known"
    return None
