"""Plans which examples share a row, so that as little of it as possible stays empty. Lengths are in tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from ..arguments import whole_number, whole_numbers
from ..errors import PadfreeError
from ..html_table import html_table


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Rows of examples, none longer than `max_length` tokens."""

    rows: list[list[int]]
    """The examples of each row, as indices into `lengths`."""
    lengths: npt.NDArray[np.int64]
    """int64 (examples,): tokens of each."""
    max_length: int

    @property
    def waste(self) -> float:
        """Returns the part of all rows that stays empty, if every row had `max_length` tokens."""
        return 1 - int(self.lengths.sum()) / (len(self.rows) * self.max_length)

    def steps(self, batch_size: int, *, rows_per_step: int = 1) -> tuple[int, int]:
        """Returns optimizer steps of an epoch: with `batch_size` examples each, and with `rows_per_step` rows each."""
        batch_size = whole_number(batch_size, "batch_size", 1)
        rows_per_step = whole_number(rows_per_step, "rows_per_step", 1)
        return math.ceil(len(self.lengths) / batch_size), math.ceil(len(self.rows) / rows_per_step)

    def _repr_html_(self) -> str:
        """Shows the plan as a table in a notebook."""
        examples, rows = len(self.lengths), len(self.rows)
        return html_table(
            f"{examples} examples in {rows} rows of at most {self.max_length} tokens",
            [
                ("stays empty", f"{self.waste:.2%}"),
                ("examples per row", f"{examples / rows:.1f}"),
                ("steps of one row", rows),
                ("steps of one example", examples),
            ],
        )

    def __str__(self) -> str:
        return (
            f"{len(self.lengths)} examples of {int(self.lengths.sum())} tokens in {len(self.rows)} rows of at most "
            f"{self.max_length}: {self.waste:.2%} stays empty, {len(self.lengths) / len(self.rows):.1f} examples per "
            f"row; an epoch has {len(self.rows)} steps of one row instead of {len(self.lengths)} of one example"
        )


def plan_packing(lengths: Iterable[int], max_length: int) -> PackingPlan:
    """Plans rows by best-fit decreasing: the longest example first, each into the fullest row that has room for it.

    Takes time in proportion to n log n.

    Args:
        lengths: tokens per example, from 1 to `max_length`.
        max_length: tokens that a row holds at most.

    Raises PadfreeError if there is no example, one is empty or longer than a row, or these are no whole numbers.

    >>> plan_packing([3, 5, 2, 6], max_length=8).rows
    [[3, 2], [1, 0]]
    """
    max_length = whole_number(max_length, "max_length", 1)
    checked = check_lengths(lengths, max_length)
    return PackingPlan(best_fit_decreasing(checked, max_length), checked, max_length)


def check_lengths(lengths: Iterable[int], most: int) -> npt.NDArray[np.int64]:
    """Returns lengths as int64 (examples,).

    Raises PadfreeError if there is none, or one is empty, longer than `most` tokens, or no whole number.
    """
    checked = whole_numbers(lengths, "lengths")
    check_not_empty(checked)
    if (longest := checked.max()) > most:
        raise PadfreeError(
            f"{int((checked > most).sum())} of {len(checked)} examples have more than {most} tokens, example "
            f"{int(checked.argmax())} has {longest}; cut them or leave them out first, or allow more"
        )
    return checked


def check_not_empty(lengths: npt.NDArray[np.int64]) -> None:
    """Raises PadfreeError if there is no example, or one has no tokens."""
    if not len(lengths):
        raise PadfreeError("no examples to pack")
    if (shortest := lengths.min()) < 1:
        raise PadfreeError(f"example {int(lengths.argmin())} has {shortest} tokens; leave empty examples out")


def best_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Returns indices into `lengths`, row by row; equal lengths stay in their order."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the tokens that they have room for
    rooms = SortedList()  # its keys that have rows
    shortest = int(lengths.min())
    order = np.argsort(-lengths, kind="stable")
    for example, length in zip(order.tolist(), lengths[order].tolist()):
        at = rooms.bisect_left(length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(example)
        room -= length
        if room >= shortest:
            if not with_room.setdefault(room, []):
                rooms.add(room)
            with_room[room].append(row)
    return rows
