"""Which sequences a batch holds: read once per forward, found again by every layer.

What reaches a layer says it all: the tensor that stands for the attention mask holds `PackedBatch.boundaries`. The
cache saves reading them again, with the device sync that this may cost. A context set around the model's forward would
not do: it is gone when gradient checkpointing recomputes a layer in the backward, and wrong when a second batch went
forward before the first one's backward. A miss costs time, never a wrong result.

Only tensors of our own are found again. The caller's may change without a trace, through numpy, `.data`, dlpack or a
collective operation, so they are read in every forward.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from .. import versions
from ..errors import PadfreeError
from .boundaries import Jump, Reading, read_beside_lengths, read_tensors
from .cache import MISSING, LastUsed, own_key
from .host import host_values, is_whole, values_on_cpu
from .lengths import Lengths, begins_of, check_no_mask_beside_prompts, check_positions, sequences_of
from .sequences import PackedSequences
from .shapes import check_no_segments, checked_positions, is_unreadable, isolates, mask_of_tokens, mask_refused
from .square_mask import is_block_causal

known_batches: LastUsed[PackedBatch] = LastUsed()
"""The batches of the newest forwards."""


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch of which at least one row holds several sequences."""

    sequences: PackedSequences
    position_ids: Tensor
    """(B, T), a tensor of our own that nobody else changes: the caller's positions, or 0, 1, 2, ... in each sequence.

    int64; if fractional positions came beside lengths or segment numbers, they stay as they are.
    """
    steps_by_one: bool | None = None
    """Whether positions go up by one inside each sequence; None if only the device knows."""
    jump: Jump | None = None
    """Where the positions could be read in another way too."""

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """int32 (sequences + 1,) or one more: cu_seqlens, on the CPU if the lengths are known there: free to read.

        Where sequences share prompts, as many negative values follow: -2 - prefix for each (`sequences_at_layer`).

        The first value is there twice if there would be as many values as tokens in a row, so that a mask of these
        values never fits the keys of a row. Loaded as flash_attention_2, decoders before 4.45 test
        `0 in attention_mask`. From 4.35 on they drop a mask without a 0, so the values begin at 0; 4.34 takes a 0 for
        padding, so there they begin at 1.
        """
        with torch.inference_mode(False):  # inference tensors have no version counter
            values = self.sequences.cheapest_cu_seqlens() + int(versions.transformers("<4.35"))
            if self.sequences.prefixes is not None:
                prefixes = torch.tensor(self.sequences.prefixes, dtype=torch.int32, device="cpu")
                values = torch.cat([values, -2 - prefixes])
            return values if len(values) != self.position_ids.shape[1] else torch.cat([values[:1], values])

    @functools.cached_property
    def positions_from_zero(self) -> Tensor:
        """int64 (B, T): position_ids as if every example began at 0, one with a shared prompt where the prompt begins.

        Those of padding may be anything from 0 on.
        """
        flat, begins = self.position_ids.reshape(-1), self.sequences.begins()
        if (prefixes := self.sequences.prefixes) is not None:
            roots = torch.tensor([i if prefix < 0 else prefix for i, prefix in enumerate(prefixes)], device="cpu")
            begins = begins[roots.to(begins.device, non_blocking=True)]
        lengths = self.sequences.kernel_cu_seqlens().diff()
        first = torch.repeat_interleave(flat[begins], lengths, output_size=self.sequences.total)
        return (flat - first).clamp(min=0).view(self.position_ids.shape)

    @functools.cached_property
    def last_lengths(self) -> list[int]:
        """Tokens of the last sequence of each row, with those of the prompt that it goes on from."""
        tokens, seen, last = self.position_ids.shape[1], 0, []
        for length, whole in zip(self.sequences.lengths, self.sequences.whole_lengths):
            seen += length
            if seen % tokens == 0:
                last.append(whole)
        return last

    @functools.cached_property
    def last_positions(self) -> list[int]:
        """The last position of each sequence. One device sync, once per batch."""
        ends = self.sequences.ends()[: len(self.sequences)]
        return self.position_ids.reshape(-1)[ends].tolist()


def read_batch(
    shape: tuple[int, int],
    device: torch.device,
    *,
    position_ids: Tensor | None,
    attention_mask: object,
    lengths: Lengths,
    generating: bool = False,
) -> PackedBatch | None:
    """Returns the sequences of a batch, or None if it is an ordinary one, which upstream serves as it is.

    Args:
        shape: (B, T) of the tokens.
        device: of the tokens.
        position_ids: (B, T), (1, T) or None.
        attention_mask: what the caller gave; 2-D masks are read, of wider ones (with a cache) the last T columns. One
            for each pair of tokens isolates, unless it says just what lengths or positions say. Beside a packed batch
            any other one is an error.
        lengths: those of `LENGTH_ARGUMENTS` that the caller gave.
        generating: whether a cache came along, so that equal positions at the start of a row are left padding.

    Raises PadfreeError if what was given contradicts itself or the shape. Reads the device once; not at all with
    lengths from our collator, nor if there is neither a position nor an integer mask.
    """
    check_no_mask_beside_prompts(lengths, attention_mask)
    if is_unreadable(position_ids) or (isinstance(attention_mask, Tensor) and is_unreadable(attention_mask)):
        return None  # traced on fake tensors: there are no values, and so no examples
    if isolates(attention_mask, shape):
        return _beside_own_mask(shape, device, position_ids, attention_mask, lengths)
    positions = checked_positions(position_ids, shape)
    mask = mask_of_tokens(attention_mask, shape, generating)
    other_mask = mask is None and attention_mask is not None
    if other_mask:
        check_no_segments(attention_mask, shape)
    if lengths:
        batch = _from_lengths(shape, device, positions, mask, lengths)
    elif positions is None and (mask is None or mask.dtype == torch.bool):
        return None  # nothing here could tell one example from the next
    else:
        batch = _from_tensors(shape, device, positions, mask, left_padded=generating or other_mask)
    if batch is not None and other_mask:
        raise mask_refused(attention_mask, shape)
    return batch


def batch_at_layer(
    boundaries: Tensor, shape: tuple[int, int], device: torch.device, position_ids: Tensor | None = None
) -> PackedBatch:
    """Returns the packed batch whose `boundaries` reached one of its layers.

    Args:
        boundaries: those of the batch, or a copy: accelerate's hooks move a layer's arguments to its device.
        shape: (B, T) of the layer's tokens, for a batch that is not found again.
        device: of the layer's tokens, likewise.
        position_ids: (B, T) if any reached the layer too; they find a batch whose boundaries were copied.
    """
    known = known_batches.find(own_key(boundaries))
    if known is MISSING and position_ids is not None:
        known = known_batches.find(own_key(position_ids))
    if known is MISSING:
        sequences = sequences_at_layer(boundaries, shape[0] * shape[1], device)
        if position_ids is None or tuple(position_ids.shape) != shape:
            position_ids = sequences.position_ids().view(shape)
        known = PackedBatch(sequences, position_ids)
        for tensor in (boundaries, known.position_ids):
            known_batches.keep(own_key(tensor), known, tensor)
    return known


def sequences_at_layer(boundaries: Tensor, total: int, device: torch.device) -> PackedSequences:
    """Returns the sequences, of so many tokens, whose `PackedBatch.boundaries` reached a layer. Reads them."""
    values = host_values(boundaries)
    cumulative, prefixes = np.unique(values[values >= 0]), -2 - values[values < 0]
    return PackedSequences.from_lengths(
        np.diff(cumulative).tolist(), total=total, device=device, prefixes=prefixes.tolist() if len(prefixes) else None
    )


def batch_of_copy(batch: PackedBatch, position_ids: Tensor | None) -> PackedBatch | None:
    """Returns a batch as it is for a decoder that is handed a copy of its positions, perhaps on another device.

    None if they are other ones. One device sync, unless they are the batch's own tensor.
    """
    own = batch.position_ids
    if position_ids is None or position_ids.shape != own.shape:
        return None
    if own_key(position_ids) == own_key(own):
        return batch
    if not torch.equal(position_ids.to(own.device, own.dtype), own):
        return None
    sequences, shape = batch.sequences.to(position_ids.device), (own.shape[0], own.shape[1])
    return _kept(sequences, position_ids, shape, steps_by_one=batch.steps_by_one, jump=batch.jump)


def _from_tensors(
    shape: tuple[int, int], device: torch.device, positions: Tensor | None, mask: Tensor | None, *, left_padded: bool
) -> PackedBatch | None:
    """Reads positions, a mask or both, or finds what was read of them in this forward."""
    if positions is not None and isinstance(ours := known_batches.find(own_key(positions)), PackedBatch):
        return ours  # the head of the model has read them
    return _packed(read_tensors(positions, mask, left_padded=left_padded), positions, shape, device)


def _from_lengths(
    shape: tuple[int, int], device: torch.device, positions: Tensor | None, mask: Tensor | None, lengths: Lengths
) -> PackedBatch | None:
    sequences = sequences_of(lengths, shape, device)
    if positions is not None:
        check_positions(positions, sequences, mask)
    if mask is not None:
        numbers = begins_of(sequences, shape, mask.device).view(-1).cumsum(0).view(shape)
        return _packed(read_beside_lengths(numbers, positions, mask), positions, shape, device)
    one_per_row = sequences.kernel_cu_seqlens().numel() == shape[0] + 1 and sequences.max_seqlen == shape[1]
    steps_by_one = _steps_by_one(positions, sequences, certainly=one_per_row)
    if one_per_row and steps_by_one:
        return None  # a row whose positions jump upstream could take for several
    return _kept(sequences, positions, shape, steps_by_one=steps_by_one)


def _steps_by_one(positions: Tensor | None, sequences: PackedSequences, *, certainly: bool) -> bool | None:
    """Returns whether positions go up by one inside each sequence.

    None if that would cost a device sync, unless it must be known `certainly`.
    """
    if positions is None:
        return True
    values = values_on_cpu(positions)
    if values is None and not certainly:
        return None
    steps = np.diff((host_values(positions) if values is None else values).reshape(-1))
    ends = np.cumsum(sequences.lengths)[:-1] - 1
    return bool((np.delete(steps, ends) == 1).all())


def _beside_own_mask(
    shape: tuple[int, int], device: torch.device, positions: Tensor | None, mask: object, lengths: Lengths
) -> PackedBatch | None:
    """Returns the sequences of a batch whose mask is for pairs of tokens, or None: then the mask isolates.

    The batch is packed if the mask hides just what the lengths, or the positions, say that it must.
    """
    if lengths:
        batch = _from_lengths(shape, device, checked_positions(positions, shape), None, lengths)
        if batch is None or _hides_the_others(mask, batch.sequences, shape, several=False):
            return batch
        raise mask_refused(mask, shape)
    if not isinstance(mask, Tensor) or positions is None or tuple(positions.shape) not in (shape, (1, shape[1])):
        return None
    positions = positions.expand(shape)
    try:
        found = read_tensors(positions, None)
    except PadfreeError:  # positions that upstream may know what to do with
        return None
    if found is None:
        return None
    sequences = PackedSequences.from_lengths(found.lengths, device=device)
    if not _hides_the_others(mask, sequences, shape, several=True):
        return None
    return _packed(dataclasses.replace(found, jump=None), positions, shape, device)


def _hides_the_others(mask: object, sequences: PackedSequences, shape: tuple[int, int], *, several: bool) -> bool:
    """Whether a mask says the same as the sequences."""
    if not isinstance(mask, Tensor):
        return False
    return is_block_causal(mask, begins_of(sequences, shape, mask.device), several=several)


def _packed(
    found: Reading | None, positions: Tensor | None, shape: tuple[int, int], device: torch.device
) -> PackedBatch | None:
    if found is None:
        return None
    sequences = PackedSequences.from_lengths(found.lengths, device=device)
    return _kept(sequences, positions, shape, steps_by_one=found.steps_by_one, jump=found.jump)


def _kept(
    sequences: PackedSequences,
    positions: Tensor | None,
    shape: tuple[int, int],
    *,
    steps_by_one: bool | None,
    jump: Jump | None = None,
) -> PackedBatch:
    """Returns a batch with tensors of its own, by which the decoder and the layers find it again without a sync."""
    with torch.inference_mode(False):  # inference tensors have no version counter
        own = sequences.position_ids() if positions is None else _copied(positions)
        batch = PackedBatch(sequences, own.reshape(shape), steps_by_one, jump)
    for tensor in (batch.position_ids, batch.boundaries):
        known_batches.keep(own_key(tensor), batch, tensor)
    return batch


def _copied(positions: Tensor) -> Tensor:
    """Returns int64 positions of our own; fractional ones as they are, and floating ones that only the device knows."""
    if positions.is_floating_point() and ((known := values_on_cpu(positions)) is None or not is_whole(known)):
        return positions.clone()
    return positions.to(torch.int64, copy=True)
