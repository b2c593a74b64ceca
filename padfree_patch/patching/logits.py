"""Which logits a patched model computes in training: set, and compared with all of them, on the model itself."""

from __future__ import annotations

import warnings

from torch import nn

from .. import verification
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..seams.language_head import is_language_head
from ..wrapping.opt_in import OptIn


def compute_logits(model: nn.Module, logits: str, *, check: bool) -> None:
    """Lets the patched heads of a model compute these logits; checks it on the model, if it can be run.

    Raises PadfreeError if no head predicts tokens, or if loss or gradients are not those of all logits.
    """
    opt_ins = OptIn.all_in(model)
    name = type(pretrained_modules(model)[0]).__name__
    if logits != "all" and not any(is_language_head(module) for module in opt_ins):
        raise PadfreeError(f"{name} has no head that predicts tokens, so logits={logits!r} means nothing; leave it out")
    for opt_in in opt_ins.values():
        opt_in.logits = logits
    if logits != "all" and check:
        _compare(name, model, logits)


def _compare(name: str, model: nn.Module, logits: str) -> None:
    result = verification.compare_with_all_logits(model)
    if result.skipped:
        warnings.warn(
            f"padfree_patch.apply could not compare logits={logits!r} with all: {result.skipped}. Compare the loss of "
            "a batch with both, or leave logits out",
            stacklevel=4,
        )
    elif not result.ok:
        found = result.failed or f"loss or gradients are off by {result.error:.3g} (at most {result.tolerance:.3g})"
        raise PadfreeError(
            f"{name}: with logits={logits!r}, {found}; it was put back as it was. Its loss is not the cross entropy of "
            "each token by itself, or its head needs every token: leave logits out"
        )
