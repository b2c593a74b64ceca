"""Which attention weights are dropped on the CPU: drawn in each call, and again, the same ones, in its backward.

torch's own draws take 5.6 ns for each weight, as long as a whole product of matrices does for six; here 16 random bits
decide for each, which take 0.5 ns. So a chance is a multiple of 1 / 65,536, and what is kept is scaled by just that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHANCES = 2**16


class Kept:
    """Draws, for one block of weights after another, which of them are kept. The same seed draws the same ones."""

    def __init__(self, dropout: float, seed: int):
        self._bound = round(dropout * _CHANCES) - _CHANCES // 2
        self._generator = np.random.Generator(np.random.SFC64(seed))

    def fill(self, block: Tensor) -> Tensor:
        """Writes 1 for each weight that is kept and 0 for each that is dropped into a contiguous tensor, returned."""
        count = block.numel()
        bits = self._generator.integers(-(2**63), 2**63, -(-count // 4), dtype=np.int64).view(np.int16)[:count]
        block.view(-1).copy_(torch.from_numpy((bits >= self._bound).view(np.int8)))  # fast from int8, slow from bool
        return block


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
