"""What sequences see of the shared prompt that they go on from, on the CPU: a call on the prompt, and the merging.

Letters: L tokens of such a sequence, or of several, P of the prompt, H query heads, K key/value heads, D head size. dx
is the gradient of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..batch.prefixes import NONE
from ..batch.sequences import PackedSequences
from .cpu_operators import flash_backward, flash_forward
from .per_sequence import chunk_size


def branches_of(sequences: PackedSequences, *, together: bool) -> Iterator[tuple[slice, slice]]:
    """Yields the tokens of a prompt, and those of sequences beside each other that go on from it.

    Args:
        sequences: of the row.
        together: whether several may be taken as one, as they see all of the prompt, and nothing else is asked.

    >>> sequences = PackedSequences.from_lengths([3, 2, 2], prefixes=[-1, 0, 0])
    >>> list(branches_of(sequences, together=True))
    [(slice(0, 3, None), slice(3, 7, None))]
    """
    ends = list(itertools.accumulate(sequences.lengths, initial=0))
    for prefix, group in itertools.groupby(enumerate(sequences.prefixes or ()), lambda each: each[1]):
        branches = [i for i, _ in group] if prefix != NONE else []
        for run in [branches] if branches and together else [[i] for i in branches]:
            yield slice(ends[prefix], ends[prefix + 1]), slice(ends[run[0]], ends[run[-1] + 1])


def views(tokens: slice, *tensors: Tensor) -> Iterator[Tensor]:
    """Yields views (1, heads, L, ...) of some tokens of tensors (T, heads, ...)."""
    return (x[tokens].transpose(0, 1).unsqueeze(0) for x in tensors)


def merge_prompt(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, window: int) -> None:
    """Merges what queries see of a prompt, k and v (1, K, P, D), into their out (1, H, L, D) and lse (1, H, L).

    With a window, they are those of the one sequence after the prompt.
    """
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
    """Computes what queries see of a prompt adds to their own dq, and to the prompt's dk and dv."""
    if not window:
        return flash_backward(dout, q, k, v, out, lse, causal=False, scale=scale)
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
