"""Keys and values gathered: a sequence that goes on from a shared prompt has those of the prompt before its own.

So a varlen kernel whose causal mask ends with the last key (flash-attn's since 2.1) needs nothing else: it is called
with other lengths of keys than of queries. Windows come out right, and autograd adds up a prompt's gradients. It costs
a copy of the prompt's keys and values for each sequence that shares it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.sequences import PackedSequences
from .per_sequence import split_by_sequence


class SeenKeys(NamedTuple):
    """Which keys each sequence sees, one sequence after another."""

    places: Tensor | None
    """int64 (seen keys,): where each of them lies in the row; None if sequences see their own tokens only."""
    cu_seqlens: Tensor
    """int32 (sequences + 1,), cumulative."""
    lengths: tuple[int, ...]
    """Keys per sequence; empty if sequences see their own tokens only."""
    longest: int
    """Most keys that a sequence sees."""
    total: int

    def gather(self, x: Tensor) -> Tensor:
        """Returns what each sequence sees of x (T, ...): (seen keys, ...)."""
        return x if self.places is None else x.index_select(0, self.places)

    def add_up(self, dx: Tensor, total: int) -> Tensor:
        """Returns the gradient (T, ...) of x from that of what `gather` gave: a prompt's is added up."""
        if self.places is None:
            return dx
        return dx.new_zeros(total, *dx.shape[1:]).index_add(0, self.places, dx)


def seen_keys(sequences: PackedSequences) -> SeenKeys:
    """Returns the keys that each sequence sees, worked out once for a `PackedSequences`. No device sync."""
    if sequences.prefixes is None:
        return SeenKeys(None, sequences.kernel_cu_seqlens(), (), sequences.max_seqlen, sequences.total)
    if "seen keys" not in sequences.derived:
        sequences.derived["seen keys"] = _seen_keys(sequences, sequences.prefixes)
    keys: SeenKeys = sequences.derived["seen keys"]
    return keys


def _seen_keys(sequences: PackedSequences, prefixes: tuple[int, ...]) -> SeenKeys:
    device = sequences.kernel_cu_seqlens().device
    own = np.split(np.arange(sequences.total), np.cumsum(sequences.lengths)[:-1])
    parts = [
        part for i, prefix in enumerate(prefixes) for part in ((own[prefix], own[i]) if prefix >= 0 else (own[i],))
    ]
    lengths = sequences.whole_lengths
    seen = PackedSequences.from_lengths(lengths, device=device)
    places = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    return SeenKeys(places, seen.kernel_cu_seqlens(), lengths, seen.max_seqlen, seen.total)


def split_with_seen_keys(
    sequences: PackedSequences, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Yields for each sequence the views (1, heads, L, ...) of tensors (T, heads, ...), as `split_by_sequence` does.

    Those of keys have what the sequence sees: a shared prompt before its own tokens.
    """
    keys = seen_keys(sequences)
    queries = split_by_sequence(sequences.lengths, *of_queries)
    seen = split_by_sequence(keys.lengths or sequences.lengths, *(keys.gather(x) for x in of_keys))
    return ((*mine, *its) for mine, its in zip(queries, seen))
