"""The data set that `pack_dataset` returns: rows that say where their examples end."""

from __future__ import annotations

import datasets

from ..errors import PadfreeError
from .boundary_columns import COLUMNS_OF_PACKED_ROWS


class PackedDataset(datasets.Dataset):  # type: ignore[misc, unused-ignore]
    """Packed rows. Taking away the last column that says where their examples end is an error."""

    tokens: str
    """The column that holds the tokens."""

    def remove_columns(self, *args: object, **kwargs: object) -> datasets.Dataset:
        return self._with_boundaries(super().remove_columns(*args, **kwargs))

    def select_columns(self, *args: object, **kwargs: object) -> datasets.Dataset:
        return self._with_boundaries(super().select_columns(*args, **kwargs))

    def select(self, *args: object, **kwargs: object) -> datasets.Dataset:
        """Gives packed rows again, and so do shuffle, sort, shard and train_test_split, which call this."""
        return as_packed(super().select(*args, **kwargs), self.tokens)

    def _with_boundaries(self, changed: datasets.Dataset) -> datasets.Dataset:
        """Returns what the data set was changed to.

        Raises PadfreeError if its rows hold tokens and nothing that says where examples end.
        """
        left = set(changed.column_names)
        if {"input_ids", self.tokens} & left and not left & set(COLUMNS_OF_PACKED_ROWS):
            raise PadfreeError(
                "rows of pack_dataset would lose the columns that say where their examples end "
                f"({', '.join(COLUMNS_OF_PACKED_ROWS)}); left would be {', '.join(changed.column_names)}, and each row "
                "would be one text: keep one of them"
            )
        return changed


def as_packed(dataset: datasets.Dataset, tokens: str) -> PackedDataset:
    """Makes a data set of packed rows a `PackedDataset`, and returns it."""
    dataset.__class__, dataset.tokens = PackedDataset, tokens
    return dataset
