"""Reads positions and masks on the host: the numpy half of finding out where the examples of a batch end.

Letters: B rows in the batch, T tokens in a row. A boundary is where a position is not the one before plus one
(0,0,0 is three sequences, 5,6,0,1 is two), and every row of a batch begins a sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PadfreeError

Values = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the positions and the mask of a packed batch say."""

    lengths: list[int]
    """Tokens per sequence."""
    positions_suffice: bool
    """Whether the positions alone show every boundary; those of padding may not."""


def read_tensors(position_ids: Tensor | None, mask: Tensor | None, *, left_padded: bool = False) -> Reading | None:
    """Returns the sequences of a batch, or None if it is an ordinary one. One device sync in all.

    Args:
        position_ids: (B, T) or None.
        mask: (B, T), 0/1 or segment numbers, or None; at least one of the two is given.
        left_padded: equal positions at the start of a row are padding, which no mask shows.

    Raises PadfreeError if positions and mask contradict each other.
    """
    if position_ids is None:
        assert mask is not None
        segments = host_values(mask)
        return Reading(_run_lengths(_segment_changes(segments)), False) if segments.max() > 1 else None
    if mask is None:
        positions = host_values(position_ids)
        breaks = _breaks(positions)
        if left_padded:
            leading = np.logical_and.accumulate(positions[:, 1:] == positions[:, :-1], axis=1)
            after = np.concatenate((np.zeros((len(leading), 1), bool), leading[:, :-1]), axis=1)  # to the first text
            if not (breaks & ~leading & ~after).any():
                return None
        return Reading(_run_lengths(breaks), True) if breaks.any() else None
    positions, segments = host_values(torch.stack([position_ids.long(), mask.long()]))
    breaks = _breaks(positions)
    if segments.max() > 1:
        lengths: list[int] | None = _agreed_segments(breaks, segments)
    else:
        lengths = _padded_packing(positions, breaks, segments != 0)
    return None if lengths is None else Reading(lengths, lengths == _run_lengths(breaks))


def lengths_of_positions(position_ids: Tensor) -> list[int]:
    """Returns tokens per sequence from positions (T,) or (B, T). One device sync."""
    return _run_lengths(_breaks(_rows(host_values(position_ids), "position_ids")))


def lengths_of_mask(attention_mask: Tensor) -> list[int]:
    """Returns tokens per sequence from a mask (T,) or (B, T) of 0/1 or segment numbers. One device sync."""
    return _run_lengths(_segment_changes(_rows(host_values(attention_mask), "attention_mask")))


def lengths_of_segments(seq_idx: Tensor) -> list[int]:
    """Returns tokens per sequence from the number (B, T) of the sequence of each token, from 0 on. One device sync."""
    return _run_lengths(_segment_changes(_rows(host_values(seq_idx), "seq_idx") + 1))


def host_values(tensor: Tensor) -> Values:
    """Returns the values on the host. Only here does the library read a caller's tensor, so here is its one sync."""
    return tensor.detach().cpu().numpy()


def _rows(values: Values, what: str) -> Values:
    if values.ndim > 2 or values.size == 0:
        raise PadfreeError(f"{what} must be (T,) or (B, T) with at least one token, found {values.shape}")
    return values.reshape(1, -1) if values.ndim < 2 else values


def _breaks(positions: Values) -> Values:
    """Returns bool (B, T - 1): whether the next token begins another sequence."""
    return positions[:, 1:] != positions[:, :-1] + 1


def _segment_changes(segments: Values) -> Values:
    """Returns bool (B, T - 1): whether the next token has another segment number.

    Raises PadfreeError if a number comes back after another one.
    """
    changes = segments[:, 1:] != segments[:, :-1]
    if segments.max() <= 1:  # a 0/1 mask: nothing to come back
        return changes
    for row, changed in zip(segments, changes):
        numbers = row[np.concatenate(([True], changed))]
        numbers = numbers[numbers != 0]
        if len(numbers) > len(set(numbers.tolist())):
            raise PadfreeError(f"attention_mask: a segment number comes back after another one in {_shown(row)}")
    return changes


def _run_lengths(breaks: Values) -> list[int]:
    """Returns tokens per run, given the breaks (B, T - 1) inside the rows; every row begins a run."""
    begins = np.concatenate((np.ones((len(breaks), 1), bool), breaks), axis=1).reshape(-1)
    return np.diff(np.append(np.flatnonzero(begins), begins.size)).tolist()


def _agreed_segments(breaks: Values, segments: Values) -> list[int]:
    """Returns lengths from segment numbers. Positions of real tokens must break where the number changes."""
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


def _padded_packing(positions: Values, breaks: Values, real: Values) -> list[int] | None:
    """Returns lengths from positions and a 0/1 mask, or None if no real token restarts.

    Each stretch of padding is one sequence.

    The left-padded rows of generate (positions 1,1,0,1,2 with mask 0,0,1,1,1) restart only in the padding: ordinary.
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


def _shown(values: Values, most: int = 16) -> str:
    shown = ", ".join(str(value) for value in values[:most].tolist())
    return f"[{shown}{', ...' if len(values) > most else ''}]"
