"""The data set that `pack_dataset` returns: rows that say where their examples end, and can't lose that unnoticed."""

from __future__ import annotations

from typing import Any

import datasets

from ..errors import PadfreeError
from .boundary_columns import BOUNDARIES


class PackedDataset(datasets.Dataset):  # type: ignore[misc, unused-ignore]
    """Packed rows. Taking away the last column that says where their examples end is an error."""

    def remove_columns(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return _with_boundaries(super().remove_columns(*args, **kwargs))

    def select_columns(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return _with_boundaries(super().select_columns(*args, **kwargs))

    def select(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
        """Gives packed rows again, and so do shuffle, sort, shard and train_test_split, which call this."""
        return as_packed(super().select(*args, **kwargs))


def as_packed(dataset: datasets.Dataset) -> PackedDataset:
    """Makes a data set of packed rows a `PackedDataset`, and returns it."""
    dataset.__class__ = PackedDataset
    return dataset


def _with_boundaries(dataset: datasets.Dataset) -> datasets.Dataset:
    """Returns the data set.

    Raises PadfreeError if its rows hold tokens and nothing that says where examples end.
    """
    if "input_ids" in dataset.column_names and not set(BOUNDARIES) & set(dataset.column_names):
        raise PadfreeError(
            f"rows of pack_dataset would lose the columns that say where their examples end ({', '.join(BOUNDARIES)}); "
            f"left would be {', '.join(dataset.column_names)}, and each row would be one text. A Trainer removes "
            "columns that its model's forward does not name: pass remove_unused_columns=False, or apply(model) before"
        )
    return dataset
