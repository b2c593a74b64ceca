"""Compares a model that computes the logits of labelled tokens only with itself as it computes all."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..seams.labelled import computing
from .dtypes import Dtypes
from .probe import TOLERANCE_EPS, Probe, largest

_CHUNK = 3
"""Rows of a chunk: fewer than the probe has labels."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far loss and gradients with some logits are from those with all."""

    error: float = math.nan
    """Largest difference: of the loss relative to it, of gradients relative to the largest."""
    tolerance: float = math.nan
    """What it may be in the model's dtype."""
    failed: str | None = None
    """The error that upstream raises with these logits, if so."""
    skipped: str | None = None
    """Why there is nothing to compare, if so."""

    @property
    def ok(self) -> bool:
        return self.skipped is not None or (self.failed is None and self.error <= self.tolerance)


def compare_logits(probe: Probe, logits: str) -> Comparison:
    """Runs a probe with all logits and with these ones. Upstream's error with all is raised as it is."""
    with Dtypes() as computed, computing("all"):
        expected = probe.loss_and_gradients()
    if expected is None:
        return Comparison(skipped="the model gives no loss for labels")
    try:
        with computing(logits, chunk=_CHUNK):
            found = probe.loss_and_gradients()
    except Exception as error:
        return Comparison(failed=f"{type(error).__name__}: {error}")
    if found is None:
        return Comparison(failed="it gives no loss any more")
    eps = max(torch.finfo(dtype).eps for dtype in computed.seen | {expected[0].dtype})
    return Comparison(_apart(found, expected), min(TOLERANCE_EPS * eps, 0.1))


def _apart(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> float:
    """Returns the largest difference; NaN if anything is not finite, or there are other gradients."""
    if [each.shape for each in found[1]] != [each.shape for each in expected[1]]:
        return math.nan
    pairs = [(found[0], expected[0]), *zip(found[1], expected[1])]
    errors = [largest(a - b) / max(largest(b), torch.finfo(torch.float32).tiny) for a, b in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
