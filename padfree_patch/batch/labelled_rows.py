"""LabelledRows: which tokens of a row predict a label; the collator sends them, so that no model asks the device."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .labels import IGNORED_LABEL
from .sequences import PackedSequences


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRows:
    """The tokens of a batch whose next token has a label, and is of the same sequence."""

    rows: Tensor
    """int64 (N,): places among all tokens of the batch, row after row."""
    total: int
    """Tokens of the batch."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> LabelledRows:
        """Returns the same rows on another device; data loaders call this to move a batch."""
        return LabelledRows(self.rows.to(device, non_blocking=non_blocking), self.total)

    @classmethod
    def of(cls, labels: Tensor, sequences: PackedSequences) -> LabelledRows:
        """Finds the rows of labels (1, T) on the CPU, of a batch that holds the sequences.

        >>> LabelledRows.of(torch.tensor([[-100, 7, 8, -100, 9]]), PackedSequences.from_lengths([2, 3])).rows
        tensor([0, 3])
        """
        labelled = labels.reshape(-1) != IGNORED_LABEL
        labelled[sequences.begins()] = False  # nothing predicts the first token of a sequence
        return cls(labelled[1:].nonzero().squeeze(1), labels.numel())
