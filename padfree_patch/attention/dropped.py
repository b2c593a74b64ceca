"""Which attention weights are dropped on the CPU: drawn in each call, and again, the same ones, in its backward.

torch's own draws take most of the time of plain attention alone (benchmarks/attention_options.py). Here 16 random bits
decide for each weight. So a chance is a multiple of 1 / 65,536, and what is kept is scaled by just that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHANCES = 2**16
_AT_ONCE = 2**15
"""Weights that are decided together: so few that what is drawn for them stays in the core's cache."""


class Kept:
    """Draws, for one block of weights after another, which of them are kept. The same seed draws the same ones."""

    def __init__(self, dropout: float, seed: int):
        self._bound = round(dropout * _CHANCES) - _CHANCES // 2
        self._bits = np.random.SFC64(seed)

    def drop(self, weights: Tensor, out: Tensor) -> Tensor:
        """Writes weights into another contiguous tensor, or into themselves, with 0 for those that are dropped."""
        for piece, to in zip(weights.view(-1).split(_AT_ONCE), out.view(-1).split(_AT_ONCE)):
            bits = self._bits.random_raw(-(-len(piece) // 4)).view(np.int16)[: len(piece)]
            kept = torch.from_numpy((bits >= self._bound).view(np.int8))  # from bool it would be slow
            torch.mul(piece, kept.to(piece.dtype), out=to)
        return out


def seed_of_call() -> int:
    """Draws a seed from torch's generator, which whoever computes a call again has put back to where it was."""
    return int(torch.randint(2**62, (), device="cpu"))


def factor_of_kept(dropout: float) -> float:
    """Returns what kept weights are multiplied by, so that they add up to one on average; 0 if none is kept.

    >>> factor_of_kept(0.5), factor_of_kept(0.0), factor_of_kept(1.0)
    (2.0, 1.0, 0.0)
    """
    kept = _CHANCES - round(dropout * _CHANCES)
    return _CHANCES / kept if kept else 0.0
