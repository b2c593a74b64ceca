"""Tokens per sequence, and cumulative lengths such as [0, 2, 6, 9]: read from whatever a caller gives, and made."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..arguments import has_truth_values
from ..errors import PadfreeError
from .host import Values

MOST_TOKENS = 2**31 - 1
"""What int32 cumulative lengths, which all kernels take, can count."""


def checked_lengths(lengths: Iterable[int], total: int | None, padding: int) -> tuple[int, ...]:
    """Returns tokens per sequence.

    Raises PadfreeError if there is no sequence, one is empty, they do not add up to the total, if there is one, or the
    last one is not of `padding` tokens, unless that is 0.
    """
    try:
        lengths = tuple(lengths)
        if has_truth_values(lengths):
            raise TypeError("truth values count nothing")
        lengths = tuple(operator.index(length) for length in lengths)
    except TypeError as error:
        raise PadfreeError(f"lengths must be positive integers, found {str(lengths)[:80]} ({error})") from error
    if not lengths:
        raise PadfreeError("no sequences: the list of lengths is empty")
    if min(lengths) < 1:
        where = next(i for i, length in enumerate(lengths) if length < 1)
        raise PadfreeError(f"sequence {where} has length {lengths[where]}; leave empty sequences out")
    if padding not in (0, lengths[-1]):
        raise PadfreeError(f"padding is {padding} tokens, but the last sequence has {lengths[-1]}")
    covered = sum(lengths)
    if total is not None and covered != total:
        raise PadfreeError(f"the lengths cover {covered} tokens, but the batch has {total}")
    if covered > MOST_TOKENS:
        raise PadfreeError(f"the lengths cover {covered} tokens, more than int32 can count ({MOST_TOKENS})")
    return lengths


def as_integers(cu_seqlens: Tensor | Sequence[int]) -> Tensor:
    """Returns cumulative lengths as a tensor (sequences + 1,), without a leading dimension of 1.

    Raises PadfreeError if they are no integers of that shape.
    """
    try:
        if isinstance(cu_seqlens, list | tuple) and has_truth_values(cu_seqlens):
            raise TypeError("truth values count nothing")
        with torch.device("cpu"):  # as_tensor would move a tensor to the default device
            cu = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.as_tensor(cu_seqlens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PadfreeError(f"cu_seqlens must be integers, found {str(cu_seqlens)[:80]} ({error})") from error
    cu = cu.reshape(-1) if cu.dim() == 2 and cu.shape[0] == 1 else cu
    if cu.dim() != 1 or cu.numel() < 2 or cu.is_floating_point() or cu.is_complex() or cu.dtype == torch.bool:
        raise PadfreeError(f"cu_seqlens must be integers (sequences + 1,), found {cu.dtype} {tuple(cu.shape)}")
    return cu


def cumulated(lengths: tuple[int, ...]) -> Tensor:
    """Returns cumulative lengths, int32 (sequences + 1,), on the CPU."""
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))


def without_repeats(cu_seqlens: Values) -> Values:
    """Returns cumulative lengths without the repetitions of the last value."""
    others = np.flatnonzero(cu_seqlens != cu_seqlens[-1])
    return cu_seqlens[: others[-1] + 2] if len(others) else cu_seqlens[:1]
