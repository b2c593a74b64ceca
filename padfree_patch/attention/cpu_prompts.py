"""What one sequence sees of the shared prompt that it goes on from, on the CPU: a call on the prompt, and the merging.

Letters: L tokens of the sequence, P of the prompt, H query heads, K key/value heads, D head size. dx is the gradient of
x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu_operators import flash_backward, flash_forward
from .per_sequence import chunk_size


def merge_prompt(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, window: int) -> None:
    """Merges what a sequence sees of its prompt, k and v (1, K, P, D), into its out (1, H, L, D) and lse (1, H, L)."""
    for queries, keys, mask in _seen_of_prompt(q, k, window):
        other, its_lse = flash_forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], causal=False, mask=mask, scale=scale
        )
        mine, merged = lse[:, :, queries], torch.logaddexp(lse[:, :, queries], its_lse)
        out[:, :, queries] *= (mine - merged).exp().unsqueeze(-1)
        out[:, :, queries] += other * (its_lse - merged).exp().unsqueeze(-1)
        lse[:, :, queries] = merged


def backward_of_prompt(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what one sequence sees of its prompt adds to its own dq, and to the prompt's dk and dv."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, mask in _seen_of_prompt(q, k, window):
        dq_chunk, dk_chunk, dv_chunk = flash_backward(
            *(x[:, :, queries] for x in (dout, q)),
            *(x[:, :, keys] for x in (k, v)),
            *(x[:, :, queries] for x in (out, lse)),
            causal=False,
            mask=mask,
            scale=scale,
        )
        dq[:, :, queries] += dq_chunk
        dk[:, :, keys] += dk_chunk
        dv[:, :, keys] += dv_chunk
    return dq, dk, dv


def _seen_of_prompt(q: Tensor, k: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yields queries of a sequence, the keys of its prompt that a window lets them see, and a mask where not all do."""
    length, before = q.shape[2], k.shape[2]
    if not 0 < window < before + length:
        yield slice(None), slice(None), None
        return
    size = chunk_size(window)
    for start in range(0, min(length, window - 1), size):
        stop, first = min(start + size, length, window - 1), max(before + start - window + 1, 0)
        distance = before + torch.arange(start, stop, device="cpu")[:, None] - torch.arange(first, before, device="cpu")
        mask = torch.zeros(distance.shape, dtype=q.dtype, device="cpu").masked_fill_(distance >= window, -torch.inf)
        yield slice(start, stop), slice(first, before), mask
