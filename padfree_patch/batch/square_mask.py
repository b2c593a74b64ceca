"""Masks that say for each pair of tokens whether one sees the other: those that only show where examples end.

Such a mask means that the caller isolates, and upstream serves it. But some collators make the mask of plain packed
rows, which is served faster as what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HIDDEN = -1e4
"""What is added to a score from here on down hides it: -inf, the least number of a dtype, or a large round one."""

_QUERIES = 1024
"""Queries that are looked at together, so that what is computed of a mask is smaller than the mask."""


def is_block_causal(mask: Tensor, begins: Tensor, *, several: bool) -> bool:
    """Whether tokens see the tokens of their own sequence up to themselves, and nothing else. One device sync.

    Tokens that see nothing at all are padding.

    Args:
        mask: (B, 1, T, T) or (1, 1, T, T): true or 1 where a query sees a key, or 0 there and far below 0 elsewhere.
        begins: bool (B, T), where sequences begin.
        several: whether a row must hold a second sequence beside its padding, too.
    """
    rows, tokens = begins.shape
    if mask.is_complex() or mask.dim() != 4 or mask.shape[1:] != (1, tokens, tokens) or mask.shape[0] not in (1, rows):
        return False
    values, number, place = (
        _comparable(mask.detach()[:, 0]),
        begins.cumsum(-1),
        torch.arange(tokens, device=mask.device),
    )
    lowest = torch.zeros((), device=mask.device) if values.dtype == torch.bool else values.min()
    good, real = [], []
    for some in place.split(_QUERIES):
        sees, hides = _meaning(values[:, some], lowest < 0)
        expected = (number[:, some, None] == number[:, None, :]) & (some[:, None] >= place)
        sees_any = sees.any(-1, keepdim=True)
        good.append(((sees | hides) & ((sees == expected) | ~sees_any)).all())
        real.append(sees_any[..., 0].expand(rows, -1))
    all_real = torch.cat(real, 1)
    good.append(_restarts(all_real, begins) if several else all_real.any())  # zeros alone may hide all or nothing
    return bool(torch.stack(good).all())


def _comparable(values: Tensor) -> Tensor:
    """Returns values of a dtype that torch compares; it does so for few of the unsigned and the 8-bit floating ones."""
    if values.is_floating_point():
        return values if values.dtype.itemsize > 1 else values.float()
    return values if values.dtype == torch.bool else values.long()


def _meaning(values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where a query sees a key, and where it does not; neither where a value means something else."""
    if values.dtype == torch.bool:
        return values, ~values
    return torch.where(added, values == 0, values == 1), torch.where(added, values <= _HIDDEN, values == 0)


def _restarts(real: Tensor, begins: Tensor) -> Tensor:
    """Returns bool (): whether in some row a real token begins a sequence after another real token."""
    after_another = real.cumsum(-1) > 1
    return (begins & real & after_another).any()
