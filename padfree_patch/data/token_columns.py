"""Reads the columns of a `datasets.Dataset` that have a value per token, in the chunks in which it has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import Integers
from ..errors import PadfreeError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

TOKENS_AT_ONCE = 2**20
"""Most tokens of a column that are copied at once."""


@dataclasses.dataclass(frozen=True)
class TokenColumn:
    """A column of lists of numbers, by example. Its values stay where they are until `gather` copies some."""

    values: list[pa.Array]
    """The numbers of each chunk, end to end."""
    chunk: Integers
    """(examples,): the chunk of each."""
    start: Integers
    """(examples,): where in its chunk each begins."""
    length: Integers
    """(examples,): how many values each has."""

    def gather(self, examples: Integers, offsets: Integers, lengths: Integers) -> pa.Array:
        """Returns values of examples end to end: of each so many from its offset on.

        Args:
            examples: (N,), which examples.
            offsets, lengths: (N,), the part of each.
        """
        import pyarrow as pa

        chunks, starts = self.chunk[examples].tolist(), (self.start[examples] + offsets).tolist()
        parts = [self.values[chunk].slice(start, n) for chunk, start, n in zip(chunks, starts, lengths.tolist())]
        return pa.concat_arrays(parts)

    def first_null(self) -> int | None:
        """Returns the first example with a value that is null."""
        if not any(each.null_count for each in self.values):
            return None
        for examples, values in self.batches():
            if values.null_count:
                owner = np.repeat(examples, self.length[examples])
                return int(owner[np.argmax(np.asarray(values.is_null()))])
        return None  # it is in a row that was not selected

    def batches(self) -> Iterator[tuple[Integers, pa.Array]]:
        """Yields all examples in order, some at a time, and their values end to end."""
        for first, end in groups(self.length):
            examples = np.arange(first, end)
            yield examples, self.gather(examples, np.zeros_like(examples), self.length[examples])


def groups(lengths: Integers, most: int = TOKENS_AT_ONCE) -> Iterator[tuple[int, int]]:
    """Yields first and end of groups of items that follow one another: of `most` tokens at most, or of one item.

    >>> list(groups(np.array([3, 4, 9, 1, 1]), most=8))
    [(0, 2), (2, 3), (3, 5)]
    """
    ends, first, before = np.cumsum(lengths), 0, 0
    while first < len(lengths):
        end = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield first, end
        first, before = end, int(ends[end - 1])


def read_columns(dataset: datasets.Dataset) -> dict[str, TokenColumn | None]:
    """Returns the columns by name, those that are no lists of numbers as None. Copies no values."""
    rows = None if dataset._indices is None else np.asarray(dataset._indices.column(0))  # after select, shuffle, ...
    table = dataset.data.table
    return {name: _token_column(table.column(name), rows) for name in dataset.column_names}


def _token_column(column: pa.ChunkedArray, rows: Integers | None) -> TokenColumn | None:
    import pyarrow as pa

    if not _is_list_of_numbers(column.type):
        return None
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    lengths = [np.asarray(each.value_lengths().fill_null(0)).astype(np.int64) for each in column.chunks]
    chunk = np.repeat(np.arange(len(lengths)), [len(each) for each in lengths])
    length = np.concatenate([*lengths, np.zeros(0, np.int64)])
    start = np.concatenate([*(np.cumsum(each) - each for each in lengths), np.zeros(0, np.int64)])
    values = [each.flatten() for each in column.chunks]
    if rows is not None:
        chunk, start, length = chunk[rows], start[rows], length[rows]
    return TokenColumn(values, chunk, start, length)


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    import pyarrow as pa

    list_kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    number_kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in list_kinds) and any(is_kind(kind.value_type) for is_kind in number_kinds)


def check_no_nulls(name: str, column: TokenColumn) -> None:
    """Raises PadfreeError naming the first example with a null among its values."""
    if (example := column.first_null()) is not None:
        raise PadfreeError(f"example {example} has a null among its {name}; mend it, or leave the column out")
