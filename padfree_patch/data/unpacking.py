"""Goes from a packed batch back to its examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch.labels import IGNORED_LABEL, ignore_first_labels
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError


def unpack(packed: Tensor, sequences: PackedSequences, *, with_prompts: bool = False) -> list[Tensor]:
    """Splits something that has a value per token of a packed batch into views, one per example.

    Of examples that share a prompt, a view has the prompt's last token and what follows it.

    Args:
        packed: (B, T, ...) such as logits, or (B * T, ...).
        sequences: those of the batch: its `packed_sequences`, or
            `PackedSequences.from_position_ids(batch["position_ids"])` if its examples share no prompts.
        with_prompts: give whole examples: copies that begin with the shared prompt, where there is one.

    Returns (length, ...) per example; with `pad_to_multiple_of` the last one is the padding.

    Raises PadfreeError if `packed` has another number of tokens.

    >>> unpack(torch.tensor([[7, 8, 9]]), PackedSequences.from_lengths([1, 2]))
    [tensor([7]), tensor([8, 9])]
    >>> unpack(torch.tensor([[5, 6, 7, 6, 8, 9]]), PackedSequences.from_lengths([1, 2, 3], prefixes=[-1, 0, 0]))
    [tensor([6, 7]), tensor([6, 8, 9])]
    """
    pieces = _tokens_first(packed, sequences).split(list(sequences.lengths))
    prefixes = sequences.prefixes
    if prefixes is None:
        return list(pieces)
    if not with_prompts:
        return [pieces[i] for i in sequences.examples]
    return [pieces[i] if prefixes[i] < 0 else torch.cat([pieces[prefixes[i]], pieces[i]]) for i in sequences.examples]


def last_tokens(packed: Tensor, sequences: PackedSequences) -> Tensor:
    """Returns the values at each example's last token, (examples, ...): the pooling of classifiers and reward models.

    Arguments and errors are those of `unpack`. Differentiable, and without a device sync if `lengths` has none.

    >>> last_tokens(torch.tensor([[7, 8, 9]]), PackedSequences.from_lengths([1, 2]))
    tensor([7, 9])
    """
    tokens = _tokens_first(packed, sequences)
    ends = sequences.ends()[: len(sequences)]
    if sequences.prefixes is not None:
        ends = ends.index_select(0, _numbers(sequences.examples, ends.device))
    return tokens.index_select(0, ends.to(tokens.device))


def sequence_log_probs(logits: Tensor, labels: Tensor, sequences: PackedSequences) -> Tensor:
    """Sums the log-probabilities of each example's labels, float32 (examples,), for preference losses such as DPO's.

    Args:
        logits: (B, T, vocabulary).
        labels: int64 (B, T); -100 is ignored, and so is every sequence's first label, which nothing predicts.
        sequences: those of the batch. With chosen examples before rejected ones, the first half of the result is the
            chosen ones'.

    Raises PadfreeError if logits or labels have another number of tokens, or other shapes, or labels are no integers.
    """
    for name, each in (("logits", logits), ("labels", labels)):
        _check_tensor(name, each)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise PadfreeError(
            f"logits must be (B, T, vocabulary), labels (B, T), found {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    flat_logits = _tokens_first(logits.flatten(0, 1), sequences)
    following = ignore_first_labels(labels, sequences).long().flatten().roll(-1)
    try:
        losses = F.cross_entropy(flat_logits.float(), following, ignore_index=IGNORED_LABEL, reduction="none")
    except IndexError as error:  # on the CPU; a device says it later, and otherwise
        raise PadfreeError(f"a label is outside of the vocabulary of {logits.shape[2]}: {error}") from error
    owner = torch.repeat_interleave(
        torch.arange(len(sequences), device=losses.device),
        sequences.cu_seqlens.diff().long().to(losses.device),
        output_size=sequences.total,
    )
    sums = -losses.new_zeros(len(sequences)).index_add(0, owner, losses)
    return sums if sequences.prefixes is None else sums.index_select(0, _numbers(sequences.examples, sums.device))


def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)


def _tokens_first(packed: Tensor, sequences: PackedSequences) -> Tensor:
    """Returns (B * T, ...), given that or (B, T, ...).

    (B, 1, ...) with B tokens could be either. It is read as the latter, but for (B, 1) of several tokens, which is one
    value for each, as heads of rewards give it.
    """
    _check_tensor("what is unpacked", packed)
    if not isinstance(sequences, PackedSequences):
        raise PadfreeError(
            f"sequences must be PackedSequences, found {type(sequences).__name__}: take the batch's packed_sequences, "
            "or PackedSequences.from_position_ids(position_ids)"
        )
    one_token_rows = packed.dim() > 1 and packed.shape[1] == 1 and (packed.dim() > 2 or packed.shape[0] == 1)
    if packed.dim() and packed.shape[0] == sequences.total and not one_token_rows:
        return packed
    if packed.dim() > 1 and packed.shape[:2].numel() == sequences.total:
        return packed.flatten(0, 1)
    raise PadfreeError(f"{sequences} don't fit something of shape {tuple(packed.shape)}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise PadfreeError(f"{name} must be a tensor, found {type(value).__name__}")
