"""Which sequences a batch holds: read once per forward, found again by every layer.

What reaches a layer says it all: the tensor that stands for the attention mask holds `PackedBatch.boundaries`. The
cache saves reading them again, with the device sync that this may cost. A context set around the model's forward would
not do: it is gone when gradient checkpointing recomputes a layer in the backward, and wrong when a second batch went
forward before the first one's backward. A miss costs time, never a wrong result.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import versions
from ..errors import PadfreeError
from .boundaries import Reading, read_tensors
from .cache import MISSING, LastUsed, callers_key, own_key
from .lengths import Lengths, agrees, check_equal, sequences_of
from .sequences import PackedSequences

known_batches: LastUsed[PackedBatch | None] = LastUsed()
"""The batches of the newest forwards; None for one that is ordinary."""


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch of which at least one row holds several sequences."""

    sequences: PackedSequences
    position_ids: Tensor
    """int64 (B, T), a tensor of our own that nobody else changes; it restarts wherever a sequence begins."""

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """int32 (sequences + 1,) or one more: cu_seqlens, on the CPU if the lengths are known there: free to read.

        The last value is there twice if there would be as many values as tokens in a row, so that a mask of these
        values never fits the keys of a row. Loaded as flash_attention_2, decoders before 4.45 test
        `0 in attention_mask`. From 4.35 on they drop a mask without a 0, so the values begin at 0; 4.34 takes a 0 for
        padding, so there they begin at 1.
        """
        with torch.inference_mode(False):  # inference tensors have no version counter
            values = self.sequences.cheapest_cu_seqlens() + int(versions.transformers("<4.35"))
            return values if len(values) != self.position_ids.shape[1] else torch.cat([values, values[-1:]])

    @functools.cached_property
    def positions_from_zero(self) -> Tensor:
        """int64 (B, T): position_ids as if every sequence began at 0."""
        return self.sequences.position_ids().view(self.position_ids.shape)

    @functools.cached_property
    def last_lengths(self) -> list[int]:
        """Tokens of the last sequence of each row."""
        tokens, seen, last = self.position_ids.shape[1], 0, []
        for length in self.sequences.lengths:
            seen += length
            if seen % tokens == 0:
                last.append(length)
        return last

    @functools.cached_property
    def last_positions(self) -> list[int]:
        """The last position of each sequence. One device sync, once per batch."""
        ends = self.sequences.cu_seqlens[1:].long() - 1
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
        attention_mask: what the caller gave; 2-D masks are read, of wider ones (with a cache) the last T columns.
        lengths: those of `LENGTH_ARGUMENTS` that the caller gave.
        generating: whether a cache came along, so that equal positions at the start of a row are left padding.

    Raises PadfreeError if what was given contradicts itself or the shape. Reads the device once; not at all with
    lengths from our collator, nor if there is neither a position nor an integer mask.
    """
    positions = _checked_positions(position_ids, shape)
    mask = _mask_of_tokens(attention_mask, shape, generating)
    if any(tensor is not None and _unreadable(tensor) for tensor in (positions, mask)):
        return None  # traced on fake tensors: there are no values, and so no examples
    other_mask = mask is None and attention_mask is not None
    if lengths:
        batch = _from_lengths(shape, device, positions, mask, lengths)
    elif positions is None and (mask is None or mask.dtype == torch.bool):
        _check_no_segments(attention_mask, mask, shape)
        return None  # nothing here could tell one example from the next
    else:
        batch = _from_tensors(shape, device, positions, mask, left_padded=generating or other_mask)
    if batch is not None and other_mask:
        raise _mask_refused(attention_mask, shape)
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
    if known is MISSING or known is None:
        cu_seqlens = torch.unique_consecutive(boundaries) - boundaries[0]
        sequences = PackedSequences.from_cu_seqlens(cu_seqlens, total=shape[0] * shape[1], device=device)
        if position_ids is None or tuple(position_ids.shape) != shape:
            position_ids = sequences.position_ids().view(shape)
        known = PackedBatch(sequences, position_ids)
        for tensor in (boundaries, known.position_ids):
            known_batches.keep(own_key(tensor), known, tensor)
    return known


def _from_tensors(
    shape: tuple[int, int], device: torch.device, positions: Tensor | None, mask: Tensor | None, *, left_padded: bool
) -> PackedBatch | None:
    """Reads positions, a mask or both, or finds what was read of them before."""
    if positions is not None and isinstance(ours := known_batches.find(own_key(positions)), PackedBatch):
        return ours  # the head of the model has read them
    key = callers_key(positions), callers_key(mask), left_padded
    known = known_batches.find(key)
    if known is MISSING:
        found = read_tensors(positions, mask, left_padded=left_padded)
        known = known_batches.keep(key, _packed(found, positions, shape, device), (positions, mask))
    return known


def _from_lengths(
    shape: tuple[int, int], device: torch.device, positions: Tensor | None, mask: Tensor | None, lengths: Lengths
) -> PackedBatch | None:
    sequences = sequences_of(lengths, shape, device)
    if positions is not None:
        check_equal(
            agrees(positions, sequences),
            "position_ids and the given lengths disagree on where sequences begin; leave one of the two out, or let "
            "the positions restart where a sequence begins",
            lambda: PackedSequences.from_position_ids(positions).lengths,
            sequences,
        )
    if mask is not None:  # its padding, or its segments, are read beside the lengths
        return _packed(read_tensors(sequences.position_ids().view(shape), mask), None, shape, device)
    if len(sequences) == shape[0] and sequences.max_seqlen == shape[1]:
        return None  # every row is one sequence
    return _kept(sequences, positions, shape)


def _packed(
    found: Reading | None, positions: Tensor | None, shape: tuple[int, int], device: torch.device
) -> PackedBatch | None:
    if found is None:
        return None
    sequences = PackedSequences.from_lengths(found.lengths, device=device)
    return _kept(sequences, positions if found.positions_suffice else None, shape)


def _kept(sequences: PackedSequences, positions: Tensor | None, shape: tuple[int, int]) -> PackedBatch:
    """Returns a batch with tensors of its own, by which the decoder and the layers find it again without a sync."""
    with torch.inference_mode(False):  # inference tensors have no version counter
        own = sequences.position_ids() if positions is None else positions.to(torch.int64, copy=True)
        batch = PackedBatch(sequences, own.reshape(shape))
    for tensor in (batch.position_ids, batch.boundaries):
        known_batches.keep(own_key(tensor), batch, tensor)
    return batch


def _checked_positions(position_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if position_ids is None or tuple(position_ids.shape) == shape:
        return position_ids
    if tuple(position_ids.shape) == (1, shape[1]):  # upstream broadcasts them over the rows
        return position_ids.expand(shape)
    raise PadfreeError(f"position_ids have shape {tuple(position_ids.shape)}, but the tokens have {shape}")


def _mask_of_tokens(attention_mask: object, shape: tuple[int, int], generating: bool) -> Tensor | None:
    """Returns the part of a 2-D mask that is about the tokens of this call, or None if there is none."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0]:
        return None
    if generating and attention_mask.shape[1] > shape[1]:  # it begins with what is in the cache
        return attention_mask[:, -shape[1] :]
    return attention_mask if attention_mask.shape[1] == shape[1] else None


def _check_no_segments(attention_mask: object, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises PadfreeError if a mask of another shape holds segment numbers: they can't be meant for these tokens."""
    if not isinstance(attention_mask, Tensor) or mask is not None or attention_mask.dim() != 2:
        return
    if attention_mask.dtype != torch.bool and not _unreadable(attention_mask) and attention_mask.max() > 1:
        raise PadfreeError(f"attention_mask holds segment numbers of shape {tuple(attention_mask.shape)} for {shape}")


def _mask_refused(attention_mask: object, shape: tuple[int, int]) -> PadfreeError:
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    return PadfreeError(
        f"the batch is packed, but its attention_mask is {found} instead of {shape}; leave the mask out, "
        "because what says where the sequences end says it all"
    )


def _unreadable(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)
