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
        labels: integers of any dtype; never changed.
        sequences: of the batch.
        shifted: whether position i holds the label of token i + 1, as `shift_labels` does. The label at the last
            token of a sequence is ignored then.
        label: what to write there instead of `IGNORED_LABEL`.

    The result is int64 if the dtype of the labels can't hold that label: in uint8, -100 would be 156.

    Raises PadfreeError if labels are no integers, or labels and sequences count other tokens. Reads nothing from the
    device.

    >>> import torch
    >>> ignore_first_labels(torch.tensor([[7, 8, 9]]), PackedSequences.from_lengths([1, 2]))
    tensor([[-100, -100,    9]])
    """
    if labels.numel() != sequences.total:
        raise PadfreeError(f"labels have shape {tuple(labels.shape)}, but the batch has {sequences.total} tokens")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise PadfreeError(f"labels must be integers, found {str(labels.dtype).removeprefix('torch.')}")
    least, most = (getattr(torch.iinfo(labels.dtype), name) for name in ("min", "max"))
    labels = labels if least <= label <= most else labels.long()
    places = (sequences.ends() if shifted else sequences.begins()).to(labels.device)
    return labels.reshape(-1).index_fill(0, places, label).view(labels.shape)
