"""PackedSequences, the one boundary type, and every dialect in which a batch can say where its examples end.

Letters: B rows in the batch, T tokens in a row. A boundary is where a position is not the one before plus one
(0,0,0 is three sequences, 5,6,0,1 is two), and every row of a batch begins a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PadfreeError


class PackedSequences:
    """Where the sequences of a packed batch begin and end, counted over its B * T tokens row after row.

    >>> packed = PackedSequences.from_lengths([2, 4, 3])
    >>> packed.cu_seqlens.tolist(), packed.max_seqlen, packed.total
    ([0, 2, 6, 9], 4, 9)
    """

    __slots__ = ("_lengths", "cu_seqlens", "derived", "max_seqlen", "total")

    cu_seqlens: Tensor
    """int32 (sequences + 1,), from 0 to total, on the device of the tokens."""
    max_seqlen: int
    """Tokens in the longest sequence."""
    total: int
    """Tokens in all of them together."""
    derived: dict[str, Any]
    """What backends work out from the sequences, by name, so that the next layer need not."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total: int, lengths: tuple[int, ...] | None = None):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.total = total
        self._lengths = lengths
        self.derived = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence. Costs one device sync if only device-side cu_seqlens were given, else none."""
        if self._lengths is None:
            self._lengths = tuple(np.diff(_host(self.cu_seqlens)).tolist())
        return self._lengths

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedSequences) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"PackedSequences({len(self)} sequences, {self.total} tokens, longest {self.max_seqlen})"

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedSequences:
        """The same sequences with `cu_seqlens` on another device; data loaders call this to move a batch."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return PackedSequences(cu_seqlens, self.max_seqlen, self.total, self._lengths)

    def position_ids(self) -> Tensor:
        """int64 (total,): 0, 1, 2, ... restarting at every sequence. No device sync."""
        starts = self.cu_seqlens.long()
        repeats = starts.diff()
        offsets = torch.repeat_interleave(starts[:-1], repeats, output_size=self.total)
        return torch.arange(self.total, device=offsets.device) - offsets

    @classmethod
    def from_lengths(
        cls, lengths: Iterable[int], *, device: torch.device | str | None = None, total: int | None = None
    ) -> PackedSequences:
        """From tokens per sequence.

        Args:
            lengths: positive integers.
            device: where `cu_seqlens` goes.
            total: tokens that the lengths must cover, if known.

        Raises PadfreeError if there is no sequence, one is empty, or they do not add up to `total`.
        """
        lengths = tuple(int(length) for length in lengths)
        if not lengths:
            raise PadfreeError("no sequences: the list of lengths is empty")
        if min(lengths) < 1:
            where = next(i for i, length in enumerate(lengths) if length < 1)
            raise PadfreeError(f"sequence {where} has length {lengths[where]}; leave empty sequences out")
        covered = sum(lengths)
        if total is not None and covered != total:
            raise PadfreeError(f"the lengths cover {covered} tokens, but the batch has {total}")
        cu_seqlens = torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))
        return cls(cu_seqlens.to(device or "cpu", non_blocking=True), max(lengths), covered, lengths)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        *,
        max_seqlen: int | None = None,
        total: int | None = None,
        device: torch.device | str | None = None,
    ) -> PackedSequences:
        """From cumulative lengths such as [0, 2, 6, 9].

        With `max_seqlen`, `total` and device-side `cu_seqlens` nothing is read back: the values are checked on the
        device (`torch._assert_async`). Otherwise they are read once.

        Args:
            cu_seqlens: integers (sequences + 1,), from 0 to the number of tokens; a leading dimension of 1 is dropped.
            max_seqlen: tokens in the longest sequence.
            total: tokens that must be covered.
            device: where `cu_seqlens` goes; where it is if not given.

        Raises PadfreeError unless they start at 0, increase, end at `total`, and agree with `max_seqlen`.
        """
        cu = torch.as_tensor(cu_seqlens)
        cu = cu.reshape(-1) if cu.dim() == 2 and cu.shape[0] == 1 else cu
        if cu.dim() != 1 or cu.numel() < 2 or cu.is_floating_point():
            raise PadfreeError(f"cu_seqlens must be integers (sequences + 1,), found {cu.dtype} {tuple(cu.shape)}")
        if cu.device.type != "cpu" and max_seqlen is not None and total is not None:
            lengths = cu.diff()
            good = (cu[0] == 0) & (cu[-1] == total) & (lengths.min() > 0) & (lengths.max() == max_seqlen)
            torch._assert_async(good, f"cu_seqlens do not fit {total} tokens with max_seqlen {max_seqlen}")
            return cls(cu.to(device or cu.device, torch.int32), int(max_seqlen), total)
        values = cu.numpy() if cu.device.type == "cpu" else _host(cu)
        if values[0] != 0:
            raise PadfreeError(f"cu_seqlens start at {values[0]}, not at 0")
        packed = cls.from_lengths(np.diff(values).tolist(), device=device or cu.device, total=total)
        if max_seqlen is not None and max_seqlen != packed.max_seqlen:
            raise PadfreeError(f"max_length is {max_seqlen}, but the longest sequence has {packed.max_seqlen} tokens")
        return packed

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> PackedSequences:
        """From positions (T,) or (B, T) that restart, at any number, where a sequence begins. One device sync.

        >>> PackedSequences.from_position_ids(torch.tensor([[5, 6, 0, 1, 2, 0, 0]])).lengths
        (2, 3, 1, 1)
        """
        rows = _rows(_host(position_ids), "position_ids")
        return cls.from_lengths(_run_lengths(_breaks(rows)), device=position_ids.device)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> PackedSequences:
        """From a mask (T,) or (B, T): 0/1, or the number of the sequence that a token belongs to, 0 for padding.

        Every stretch of padding is one sequence of its own. One device sync.

        >>> PackedSequences.from_attention_mask(torch.tensor([[1, 1, 2, 2, 2, 0, 0]])).lengths
        (2, 3, 2)
        >>> PackedSequences.from_attention_mask(torch.tensor([[1, 1, 1], [0, 1, 1]])).lengths
        (3, 1, 2)
        """
        rows = _rows(_host(attention_mask), "attention_mask")
        return cls.from_lengths(_run_lengths(_segment_changes(rows)), device=attention_mask.device)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the positions and the mask of a packed batch say."""

    lengths: list[int]
    """Tokens per sequence."""
    shown: bool
    """Whether the positions alone show every boundary; those of padding may not."""


def read_tensors(position_ids: Tensor | None, mask: Tensor | None, *, left_padded: bool = False) -> Reading | None:
    """The sequences of a batch, or None if it is an ordinary one. One device sync in all.

    Args:
        position_ids: (B, T) or None.
        mask: (B, T), 0/1 or segment numbers, or None; at least one of the two is given.
        left_padded: equal positions at the start of a row are padding that no mask tells of.

    Raises PadfreeError if positions and mask contradict each other.
    """
    if position_ids is None:
        assert mask is not None
        segments = _host(mask)
        return Reading(_run_lengths(_segment_changes(segments)), False) if segments.max() > 1 else None
    if mask is None:
        positions = _host(position_ids)
        breaks = _breaks(positions)
        if left_padded:
            leading = np.logical_and.accumulate(positions[:, 1:] == positions[:, :-1], axis=1)
            after = np.concatenate((np.zeros((len(leading), 1), bool), leading[:, :-1]), axis=1)  # to the first text
            if not (breaks & ~leading & ~after).any():
                return None
        return Reading(_run_lengths(breaks), True) if breaks.any() else None
    positions, segments = _host(torch.stack([position_ids.long(), mask.long()]))
    breaks = _breaks(positions)
    if segments.max() > 1:
        lengths: list[int] | None = _agreed_segments(breaks, segments)
    else:
        lengths = _padded_packing(positions, breaks, segments != 0)
    return None if lengths is None else Reading(lengths, lengths == _run_lengths(breaks))


def read_segments(seq_idx: Tensor) -> list[int]:
    """Tokens per sequence from the number (B, T) of the sequence that each token belongs to. One device sync."""
    return _run_lengths(_segment_changes(_rows(_host(seq_idx), "seq_idx") + 1))


def begins_of(values: Tensor, begins: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """bool (B, T): True at the start of every row and where `begins(value, the one before)`; nothing is read."""
    first = torch.ones_like(values[:, :1], dtype=torch.bool)
    return torch.cat([first, begins(values[:, 1:], values[:, :-1])], dim=1)


def agrees(positions_or_begins: Tensor, sequences: PackedSequences) -> Tensor:
    """Whether `sequences` begin just where positions (B, T) restart, or a bool (B, T) is True; nothing is read."""
    begins = positions_or_begins
    if begins.dtype != torch.bool:
        begins = begins_of(begins, lambda now, before: now != before + 1)
    expected = torch.zeros(begins.numel(), dtype=torch.bool, device=begins.device)
    return (begins.reshape(-1) == expected.index_fill_(0, sequences.cu_seqlens[:-1].long(), True)).all()


def _host(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values on the host; the one place where this library reads a tensor, and so the one device sync."""
    return tensor.detach().cpu().numpy()


def _rows(values: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
    if values.ndim > 2 or values.size == 0:
        raise PadfreeError(f"{what} must be (T,) or (B, T) with at least one token, found {values.shape}")
    return values.reshape(1, -1) if values.ndim < 2 else values


def _breaks(positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(B, T - 1): whether the token after each one begins another sequence."""
    return positions[:, 1:] != positions[:, :-1] + 1


def _segment_changes(segments: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(B, T - 1): whether the segment number changes after each token; each number is one stretch of its row."""
    changes = segments[:, 1:] != segments[:, :-1]
    if segments.max() <= 1:  # a 0/1 mask: nothing to come back
        return changes
    for row, changed in zip(segments, changes):
        numbers = row[np.concatenate(([True], changed))]
        numbers = numbers[numbers != 0]
        if len(numbers) > len(set(numbers.tolist())):
            raise PadfreeError(f"attention_mask: a segment number comes back after another one in {_few(row)}")
    return changes


def _run_lengths(breaks: np.ndarray[Any, Any]) -> list[int]:
    """Tokens per run, given the breaks (B, T - 1) inside the rows; every row begins a run."""
    begins = np.concatenate((np.ones((len(breaks), 1), bool), breaks), axis=1).reshape(-1)
    return np.diff(np.append(np.flatnonzero(begins), begins.size)).tolist()


def _agreed_segments(breaks: np.ndarray[Any, Any], segments: np.ndarray[Any, Any]) -> list[int]:
    """Lengths from segment numbers whose real tokens restart exactly where the number changes."""
    changes = _segment_changes(segments)
    both_real = (segments[:, 1:] > 0) & (segments[:, :-1] > 0)
    wrong = (changes != breaks) & both_real
    if wrong.any():
        row, token = (int(i) for i in np.argwhere(wrong)[0])
        raise PadfreeError(
            f"attention_mask and position_ids disagree in row {row} between tokens {token} and {token + 1}: "
            f"segments {segments[row, token]}, {segments[row, token + 1]}, but the position "
            f"{'restarts' if breaks[row, token] else 'goes on'} there"
        )
    return _run_lengths(changes)


def _padded_packing(
    positions: np.ndarray[Any, Any], breaks: np.ndarray[Any, Any], real: np.ndarray[Any, Any]
) -> list[int] | None:
    """Lengths from positions and a 0/1 mask: each stretch of padding is one sequence; None if no real token restarts.

    generate's left-padded rows (positions 1,1,0,1,2 with mask 0,0,1,1,1) restart only in the padding: ordinary.
    """
    packed = False
    holes: list[tuple[int, int]] = []
    for row, (position, is_real) in enumerate(zip(positions, real)):
        tokens = np.flatnonzero(is_real)
        step, gap = np.diff(position[tokens]), np.diff(tokens)
        goes_on = (step == 1) | (step == gap)  # over a hole, positions count real tokens or all of them
        packed |= not goes_on.all()
        holes += [(row, int(tokens[i])) for i in np.flatnonzero(goes_on & (gap > 1))]
    if not packed:
        return None
    if holes:
        row, token = holes[0]
        raise PadfreeError(
            f"attention_mask has a 0 inside a sequence of a packed batch: row {row}, after token {token}, "
            "where the positions go on; padding can only stand before or after a sequence"
        )
    padding = ~(real[:, 1:] | real[:, :-1])
    return _run_lengths((breaks & ~padding) | (real[:, 1:] != real[:, :-1]))


def _few(values: np.ndarray[Any, Any], most: int = 16) -> str:
    shown = ", ".join(str(value) for value in values[:most].tolist())
    return f"[{shown}{', ...' if len(values) > most else ''}]"
