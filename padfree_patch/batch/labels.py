"""Which labels of a packed row are ignored: nothing predicts the first token of a sequence."""

from __future__ import annotations

import torch

from ..errors import PadfreeError
from .sequences import PackedSequences

IGNORED_LABEL = -100
"""The label that every loss of transformers, and torch's cross entropy by default, leaves out."""


def ignore_first_labels(
    labels: torch.Tensor, sequences: PackedSequences, *, shifted: bool = False, label: int = IGNORED_LABEL
) -> torch.Tensor:
    """Returns labels, (B, T) or (B * T,), with `IGNORED_LABEL` where the label is the first token of a sequence.

    Args:
        labels: integers; never changed.
        sequences: of the batch.
        shifted: whether position i holds the label of token i + 1, as `shift_labels` does. The label at the last
            token of a sequence is ignored then.
        label: what to write there instead of `IGNORED_LABEL`.

    Raises PadfreeError if labels and sequences count other tokens. Reads nothing from the device.

    >>> import torch
    >>> ignore_first_labels(torch.tensor([[7, 8, 9]]), PackedSequences.from_lengths([1, 2]))
    tensor([[-100, -100,    9]])
    """
    if labels.numel() != sequences.total:
        raise PadfreeError(f"labels have shape {tuple(labels.shape)}, but the batch has {sequences.total} tokens")
    cu_seqlens = sequences.cu_seqlens.long().to(labels.device)
    places = cu_seqlens[1:] - 1 if shifted else cu_seqlens[:-1]
    return labels.reshape(-1).index_fill(0, places, label).view(labels.shape)
