"""A packed row in chunks of queries, as the CPU computes attention in matrix products, and the keys that each sees.

Letters: T tokens of all sequences, S keys that they see (their own, and those of shared prompts before them), H query
heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.sequences import PackedSequences
from .prompts import seen_keys

QUERIES, SCORES = 64, 2**18
"""Most queries of a chunk, and most scores, unless they are 16 queries of one key head: three times that many numbers
lie in a core's cache. Measured on two x86 cores with AVX-512, 2 MB of cache each: benchmarks/attention.py."""


class Chunk(NamedTuple):
    """Queries of one sequence, and the keys from the first that any of them sees to the last."""

    heads: slice
    """Key heads; a chunk has the query heads that share them."""
    queries: slice
    """In the row's tokens."""
    keys: slice
    """In what all sequences see, one after another."""
    hidden: int
    """Keys of a window that would lie before the sequence begins; -1 without a window."""

    def hide(self, scores: Tensor) -> Tensor:
        """Adds -inf, in place, to the scores (K, queries * G, keys) of keys that a query does not see."""
        count = self.queries.stop - self.queries.start
        later, before = _triangles(count, scores.dtype)
        by_query = scores.view(scores.shape[0], count, -1, scores.shape[2])
        by_query[..., -count:].add_(later)
        if 0 <= self.hidden < count:
            by_query[..., : count - self.hidden].add_(before[..., self.hidden :])
        return scores


@functools.lru_cache(maxsize=256)
def _triangles(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Makes two masks to add, (queries, 1, keys): -inf above the diagonal, and below it."""
    full = torch.full((count, count), -torch.inf, dtype=dtype, device="cpu")
    return full.triu(1)[:, None], full.tril(-1)[:, None]


def chunks_of(sequences: PackedSequences, window: int, key_heads: int, groups: int) -> Iterator[Chunk]:
    """Yields the chunks of all sequences, always in the same order: those of the same queries one after another."""
    seen = seen_keys(sequences)
    queries_begin = keys_begin = 0
    for length, keys in zip(sequences.lengths, seen.lengths or sequences.lengths):
        sees = min(window or keys, keys)
        count = min(QUERIES, max(16, SCORES // (groups * sees)))
        before = keys - length
        for start in range(0, length, count):
            stop = min(start + count, length)
            first = before + start - sees + 1  # the oldest key that the first query sees, if there were so many
            queries = slice(queries_begin + start, queries_begin + stop)
            seen_here = slice(keys_begin + max(first, 0), keys_begin + before + stop)
            hidden = max(-first, 0) if sees < keys else -1
            together = max(1, SCORES // ((stop - start) * groups * (seen_here.stop - seen_here.start)))
            for head in range(0, key_heads, together):
                yield Chunk(slice(head, min(head + together, key_heads)), queries, seen_here, hidden)
        queries_begin, keys_begin = queries_begin + length, keys_begin + keys


def heads_first(x: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Copies (T, H, D) to (K, T * G, D), where the queries of a chunk lie together."""
    tokens = x.shape[0]
    return x.to(dtype).reshape(tokens, key_heads, -1).transpose(0, 1).contiguous().view(key_heads, -1, x.shape[2])


def tokens_first(x: Tensor, tokens: int) -> Tensor:
    """Copies (K, T * G, D) to (T, H, D)."""
    key_heads, _, size = x.shape
    return x.view(key_heads, tokens, -1).transpose(0, 1).reshape(tokens, -1, size)
