"""What the ways that call PyTorch once per sequence, `sdpa` and `cpu`, share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def split_by_sequence(lengths: tuple[int, ...], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields for each sequence the views (1, heads, L, ...) of tensors (T, heads, ...).

    The views come from `split`: autograd joins their gradients once. A slice per sequence would write a zero-filled
    gradient of all T tokens for each of them.

    >>> q, lse = torch.zeros(5, 4, 8), torch.zeros(5, 4)
    >>> [(q_.shape, lse_.shape) for q_, lse_ in split_by_sequence((2, 3), q, lse)][1]
    (torch.Size([1, 4, 3, 8]), torch.Size([1, 4, 3]))
    """
    return zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in tensors))


def chunk_size(window: int) -> int:
    """Says how many queries of a sequence to compute at once if each sees `window` keys.

    Small chunks cost calls, large ones masked work: a quarter of the window wastes at most a fifth of the work.

    >>> [chunk_size(window) for window in (4, 512, 4096)]
    [64, 128, 256]
    """
    return min(max(window // 4, 64), 256)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gives float64 for float64, and float32 for everything else.

    >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
