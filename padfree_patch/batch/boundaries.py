"""Reads positions and masks on the host: the numpy half of finding out where the examples of a batch end.

Letters: B rows in the batch, T tokens in a row. A boundary is where a position is not the one before plus one
(0,0,0 is three sequences, 5,6,0,1 is two), and every row of a batch begins a sequence.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PadfreeError
from .host import Values, check_whole, host_together, host_values

_REMEDY = "give whole positions as integers, or say by lengths or segment numbers where examples end"


@dataclasses.dataclass(frozen=True)
class Jump:
    """A place where positions jump ahead and nothing else says whether an example ends there. It is read as an end."""

    row: int
    token: int
    """The last one before the jump."""
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the positions and the mask of a packed batch say."""

    lengths: list[int]
    """Tokens per sequence."""
    jump: Jump | None = None
    """The first place that could be read in two ways."""
    steps_by_one: bool | None = True
    """Whether each position of a real token is the one before plus one, except where a sequence begins; None: unknown.
    """


def read_tensors(position_ids: Tensor | None, mask: Tensor | None, *, left_padded: bool = False) -> Reading | None:
    """Returns the sequences of a batch, or None if it is an ordinary one. One device sync in all.

    Args:
        position_ids: (B, T) or None, whole numbers of any dtype, unless segment numbers say where sequences end.
        mask: (B, T), 0/1 or segment numbers, or None; at least one of the two is given.
        left_padded: equal positions at the start of a row are padding, which no mask shows.

    Raises PadfreeError if positions and mask contradict each other, or hold what their dtype can't say.
    """
    if position_ids is None:
        assert mask is not None
        segments = host_values(mask)
        if not _numbers_segments(segments):
            return None
        return Reading(_run_lengths(_segment_changes(check_whole(segments, mask.dtype, "attention_mask"))))
    if mask is None:
        return _read_positions(_whole_positions(host_values(position_ids), position_ids.dtype), left_padded=left_padded)
    positions, segments = host_together(position_ids, mask)
    if _numbers_segments(segments):
        return _read_segments(positions, check_whole(segments, mask.dtype, "attention_mask"))
    return _read_padded(_whole_positions(positions, position_ids.dtype), segments)


def read_beside_lengths(numbers: Tensor, positions: Tensor | None, mask: Tensor) -> Reading | None:
    """Returns the sequences of a batch whose lengths were given, or None if it is an ordinary one. One device sync.

    Args:
        numbers: int64 (B, T), from 1 on: the number of the given sequence that a token belongs to.
        positions: (B, T) or None; those of real tokens go up inside a sequence.
        mask: (B, T), 0/1 or segment numbers. Its padding may stand at either end of a given sequence, or be one.

    Raises PadfreeError if the mask has another segment where no sequence begins, or none where one does, or padding
    between two tokens of a sequence.
    """
    numbered, segments, *given = host_together(*(each for each in (numbers, mask, positions) if each is not None))
    real = segments != 0
    between = _neighbours(real)
    same = between.keep(numbered)
    if has_segments := _numbers_segments(segments):
        _check_segments(check_whole(segments, mask.dtype, "attention_mask"), between, same)
    goes_on = between.goes_on(given[0]) if given else np.ones_like(same)
    if not has_segments and same.all() and goes_on.all():
        return None
    if not has_segments:
        _check_padding(segments, between, same)
    alone = np.where(real, numbered, 0)
    return Reading(_run_lengths(alone[:, 1:] != alone[:, :-1]), steps_by_one=bool((goes_on | ~same).all()))


def lengths_of_positions(position_ids: Tensor) -> list[int]:
    """Returns tokens per sequence from positions (T,) or (B, T). One device sync."""
    return _run_lengths(_breaks(_whole_positions(_rows(position_ids, "position_ids"), position_ids.dtype)))


def jump_of_positions(position_ids: Tensor) -> Jump | None:
    """Returns the first place where positions (T,) or (B, T) jump ahead; None if there is none. One device sync."""
    positions = _whole_positions(_rows(position_ids, "position_ids"), position_ids.dtype)
    return _first_jump(positions, _breaks(positions))


def lengths_of_mask(attention_mask: Tensor) -> list[int]:
    """Returns tokens per sequence from a mask (T,) or (B, T) of 0/1 or segment numbers. One device sync."""
    segments = check_whole(_rows(attention_mask, "attention_mask"), attention_mask.dtype, "attention_mask")
    return _run_lengths(_segment_changes(segments))


def lengths_of_segments(seq_idx: Tensor) -> list[int]:
    """Returns tokens per sequence from the number (B, T) of the sequence of each token, from 0 on. One device sync."""
    if seq_idx.dtype == torch.bool:
        raise PadfreeError("seq_idx must be integers, found bool, which can number two sequences only")
    segments = check_whole(_rows(seq_idx, "seq_idx"), seq_idx.dtype, "seq_idx")
    return _run_lengths(_segment_changes(segments + 1, "seq_idx"))


def _rows(tensor: Tensor, what: str) -> Values:
    if not isinstance(tensor, Tensor):
        raise PadfreeError(f"{what} must be a tensor (T,) or (B, T), found {type(tensor).__name__}")
    if tensor.dim() > 2 or tensor.numel() == 0:
        raise PadfreeError(f"{what} must be (T,) or (B, T) with at least one token, found {tuple(tensor.shape)}")
    values = host_values(tensor)
    return values.reshape(1, -1) if values.ndim < 2 else values


def _whole_positions(values: Values, dtype: torch.dtype) -> Values:
    """Returns int64 positions (B, T), which came from a tensor of that dtype.

    Raises PadfreeError if the dtype may not have been able to hold them.
    """
    positions = check_whole(values, dtype, "position_ids", _REMEDY)
    if dtype.is_floating_point:
        return positions
    kind = str(dtype).removeprefix("torch.")
    if dtype == torch.bool:
        raise PadfreeError(f"position_ids must be integers, found {kind}")
    limits = torch.iinfo(dtype)
    wraps = np.argwhere((positions[:, :-1] == limits.max) & (positions[:, 1:] == limits.min))
    if len(wraps):
        row, token = (int(i) for i in wraps[0])
        raise PadfreeError(
            f"position_ids go from {limits.max} to {limits.min} in row {row} after token {token}: {kind} can't hold "
            "the next number, so this may be the end of an example or not; give them as int64"
        )
    return positions


def _breaks(positions: Values) -> Values:
    """Returns bool (B, T - 1): whether the next token begins another sequence."""
    return positions[:, 1:] != positions[:, :-1] + 1


def _first_jump(positions: Values, breaks: Values) -> Jump | None:
    """Returns the first of the breaks (B, T - 1) at which positions jump ahead."""
    ahead = np.argwhere(breaks & (positions[:, 1:] > positions[:, :-1]))
    if not len(ahead):
        return None
    row, token = (int(i) for i in ahead[0])
    return Jump(row, token, int(positions[row, token]), int(positions[row, token + 1]))


def _read_positions(positions: Values, *, left_padded: bool) -> Reading | None:
    breaks = told = _breaks(positions)
    if left_padded:
        leading = np.logical_and.accumulate(positions[:, 1:] == positions[:, :-1], axis=1)
        after = np.concatenate((np.zeros((len(leading), 1), bool), leading[:, :-1]), axis=1)  # to the first text
        told = breaks & ~leading & ~after
    return Reading(_run_lengths(breaks), _first_jump(positions, told)) if told.any() else None


def _numbers_segments(mask: Values) -> bool:
    """Whether a mask holds more than 0 and 1. Its maximum does not tell: it is NaN if any value is."""
    return bool((mask > 1).any())


def _segment_changes(segments: Values, name: str = "attention_mask") -> Values:
    """Returns bool (B, T - 1): whether the next token has another segment number.

    Raises PadfreeError if a number is negative, or comes back after another one.
    """
    if (lowest := segments.min()) < 0:
        raise PadfreeError(f"{name} holds {lowest}; the numbers of padding and of segments start at 0")
    changes = segments[:, 1:] != segments[:, :-1]
    if segments.max() <= 1:  # a 0/1 mask: nothing to come back
        return changes
    for row, changed in zip(segments, changes):
        numbers = row[np.concatenate(([True], changed))]
        numbers = numbers[numbers != 0]
        if len(numbers) > len(set(numbers.tolist())):
            raise PadfreeError(f"{name}: a segment number comes back after another one in {_shown(row)}")
    return changes


def _run_lengths(breaks: Values) -> list[int]:
    """Returns tokens per run, given the breaks (B, T - 1) inside the rows; every row begins a run."""
    begins = np.concatenate((np.ones((len(breaks), 1), bool), breaks), axis=1).reshape(-1)
    return np.diff(np.append(np.flatnonzero(begins), begins.size)).tolist()


def _read_segments(positions: Values, segments: Values) -> Reading:
    """Reads segment numbers. The positions of real tokens must go up inside a segment, and break where it ends."""
    changes = _segment_changes(segments)
    both_real = (segments[:, 1:] > 0) & (segments[:, :-1] > 0)
    breaks = _breaks(positions)
    goes_up = positions[:, 1:] > positions[:, :-1]  # by more than one too: the segment numbers decide
    wrong = np.where(changes, ~breaks, ~goes_up) & both_real
    if wrong.any():
        row, token = (int(i) for i in np.argwhere(wrong)[0])
        raise PadfreeError(
            f"attention_mask and position_ids disagree in row {row} between tokens {token} and {token + 1}: "
            f"segments {segments[row, token]}, {segments[row, token + 1]}, but the position "
            f"{'restarts' if breaks[row, token] else 'goes on'} there"
        )
    return Reading(_run_lengths(changes), steps_by_one=not (breaks & ~changes & both_real).any())


def _read_padded(positions: Values, mask: Values) -> Reading | None:
    """Reads positions and a 0/1 mask; None if no real token restarts. Each stretch of padding is one sequence.

    The left-padded rows of generate (positions 1,1,0,1,2 with mask 0,0,1,1,1) restart only in the padding: ordinary.
    """
    breaks, real = _breaks(positions), mask != 0
    between = _neighbours(real)
    goes_on = between.goes_on(positions)
    if goes_on.all():
        return None
    _check_padding(mask, between, goes_on)
    real_change, both_real = real[:, 1:] != real[:, :-1], real[:, 1:] & real[:, :-1]
    lengths = _run_lengths((breaks & both_real) | real_change)
    return Reading(lengths, _first_jump(positions, breaks & both_real))


class _Neighbours(NamedTuple):
    """Pairs of real tokens of a row with nothing but padding between them."""

    row: Values
    first: Values
    second: Values

    def keep(self, values: Values) -> Values:
        """Returns where both have the same value."""
        same: Values = values[self.row, self.first] == values[self.row, self.second]
        return same

    def goes_on(self, positions: Values) -> Values:
        """Returns where positions go on. Over padding, they count real tokens or all of them."""
        step = positions[self.row, self.second] - positions[self.row, self.first]
        return (step == 1) | (step == self.second - self.first)


def _neighbours(real: Values) -> _Neighbours:
    rows, tokens = np.nonzero(real)
    in_row = rows[1:] == rows[:-1]
    return _Neighbours(rows[1:][in_row], tokens[:-1][in_row], tokens[1:][in_row])


def _check_segments(segments: Values, between: _Neighbours, same: Values) -> None:
    """Raises PadfreeError unless real tokens have the same segment number where they are of the same given sequence."""
    _segment_changes(segments)
    wrong = np.flatnonzero(between.keep(segments) != same)
    if len(wrong):
        row, first, second = (int(each[wrong[0]]) for each in between)
        raise PadfreeError(
            f"attention_mask and the given lengths disagree in row {row} between tokens {first} and {second}: segments "
            f"{segments[row, first]}, {segments[row, second]}, but by the lengths "
            f"{'both are of one sequence' if same[wrong[0]] else 'another sequence begins'}"
        )


def _check_padding(mask: Values, between: _Neighbours, goes_on: Values) -> None:
    """Raises PadfreeError unless the 0/1 mask of a packed batch shows padding, and that outside all sequences."""
    odd = np.argwhere((mask != 0) & (mask != 1))
    if len(odd):
        row, token = (int(i) for i in odd[0])
        raise PadfreeError(
            f"attention_mask of a packed batch: {mask[row, token]:g} (row {row}, token {token}); it must be 0 for "
            "padding and 1 for tokens, or hold segment numbers from 1 on"
        )
    holes = np.flatnonzero(goes_on & (between.second > between.first + 1))
    if len(holes):
        raise PadfreeError(
            f"attention_mask has a 0 inside a sequence of a packed batch: row {between.row[holes[0]]}, after token "
            f"{between.first[holes[0]]}, where the example goes on; padding can only stand before or after a sequence"
        )


def _shown(values: Values, most: int = 16) -> str:
    shown = ", ".join(str(value) for value in values[:most].tolist())
    return f"[{shown}{', ...' if len(values) > most else ''}]"
