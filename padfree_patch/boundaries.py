"""Which sequences a batch holds: worked out once per forward, found again by every layer.

The position_ids tensor that reaches a layer is the truth; the cache only saves the time (and the device sync) of
reading it again. A context set around the model's forward would not do: it is gone when gradient checkpointing
recomputes a layer in the backward, and wrong when a second batch went forward before the first one's backward. What a
miss costs is one sync, never a wrong result.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import PadfreeError
from .packing import PackedSequences, read_positions_and_mask, starts_agree

LENGTH_ARGUMENTS = ("packed_sequences", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What a collator may give beside position_ids; taken out of the call before upstream's forward could refuse it."""


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch of which at least one row holds several sequences."""

    sequences: PackedSequences
    position_ids: Tensor
    """int64 (B, T), a tensor of our own that nobody else changes."""

    @functools.cached_property
    def positions_from_zero(self) -> Tensor:
        """int64 (B, T): position_ids as if every sequence began at 0."""
        return self.sequences.position_ids().view(self.position_ids.shape)


def read_batch(
    shape: tuple[int, int],
    device: torch.device,
    *,
    position_ids: Tensor | None,
    attention_mask: Any,
    lengths: Mapping[str, Any],
) -> PackedBatch | None:
    """The sequences of a batch, or None if it is an ordinary one, which upstream serves as it is.

    Args:
        shape: (B, T) of the tokens.
        device: of the tokens.
        position_ids: (B, T), (1, T) or None.
        attention_mask: what the caller gave; 2-D masks of the shape of the tokens are read.
        lengths: those of `LENGTH_ARGUMENTS` that the caller gave.

    Raises PadfreeError if what was given contradicts itself or the shape. Reads the device once, not at all with
    lengths from our collator, and not at all if there is neither a position nor an integer mask.
    """
    positions = _checked_positions(position_ids, shape)
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.shape == shape else None
    if lengths:
        return _read_lengths(shape, device, positions, mask, lengths)
    if positions is None and (mask is None or mask.dtype == torch.bool):
        return None  # nothing here could tell one example from the next
    key = _key(positions), _key(mask)
    known = _cache.find(key)
    if known is None:
        known = _read(positions, mask, shape, device)
        _cache.keep(key, known, (positions, mask))
    if isinstance(known, PackedBatch) and attention_mask is not None and mask is None:
        _refuse_mask(attention_mask, shape)
    return known if isinstance(known, PackedBatch) else None


def batch_at_layer(position_ids: Tensor | None) -> PackedBatch:
    """The packed batch to which the position_ids (B, T) that reach one of its layers belong."""
    if position_ids is None:
        raise PadfreeError("no position_ids reached the attention of a packed batch; they say where its sequences end")
    key = _key(position_ids), None
    known = _cache.find(key)
    if known is None:
        rows, tokens = position_ids.shape
        known = _read(position_ids, None, (rows, tokens), position_ids.device)
        _cache.keep(key, known, (position_ids,))
    if isinstance(known, _Ordinary):
        raise PadfreeError("the layers of a packed batch were given position_ids that never restart")
    return known


def _read(
    positions: Tensor | None, mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> PackedBatch | _Ordinary:
    found = read_positions_and_mask(positions, mask)
    if found is None:
        return ORDINARY
    return _packed(PackedSequences.from_lengths(found, device=device), positions, shape)


def _packed(sequences: PackedSequences, positions: Tensor | None, shape: tuple[int, int]) -> PackedBatch:
    """The batch with position_ids of its own, under which the layers find the sequences again without a sync."""
    with torch.inference_mode(False):  # inference tensors have no version counter
        own = sequences.position_ids() if positions is None else positions.to(torch.int64, copy=True)
        batch = PackedBatch(sequences, own.reshape(shape))
    _cache.keep((_key(batch.position_ids), None), batch, (batch.position_ids,))
    return batch


def _read_lengths(
    shape: tuple[int, int],
    device: torch.device,
    positions: Tensor | None,
    mask: Tensor | None,
    lengths: Mapping[str, Any],
) -> PackedBatch | None:
    total = shape[0] * shape[1]
    sequences = _sequences_from(lengths, total, device)
    if positions is not None:
        _check_agreement(positions, sequences)
    segments = None if mask is None or mask.dtype == torch.bool else read_positions_and_mask(None, mask)
    if segments is not None and tuple(segments) != sequences.lengths:
        raise PadfreeError(f"attention_mask has segments of {segments} tokens, the lengths say {sequences.lengths}")
    if len(sequences) == shape[0] and sequences.max_seqlen == shape[1]:
        return None  # every row is one sequence
    _check_rows(shape, sequences)
    return _packed(sequences, positions, shape)


def _sequences_from(lengths: Mapping[str, Any], total: int, device: torch.device) -> PackedSequences:
    packed = lengths.get("packed_sequences")
    if packed is not None:
        if packed.total != total:
            raise PadfreeError(f"the lengths cover {packed.total} tokens, but the batch has {total}")
        return packed.to(device)
    cu_seqlens = lengths.get("cu_seq_lens_q", lengths.get("cu_seq_lens_k"))
    if cu_seqlens is not None:
        longest = lengths.get("max_length_q", lengths.get("max_length_k"))
        return PackedSequences.from_cu_seqlens(cu_seqlens, max_seqlen=longest, total=total, device=device)
    if (seq_idx := lengths.get("seq_idx")) is not None:
        found = PackedSequences.from_attention_mask(seq_idx + 1)
        return PackedSequences.from_lengths(found.lengths, device=device, total=total)
    raise PadfreeError(
        f"{', '.join(lengths)} without cu_seq_lens_q: the maximum alone does not say where sequences end"
    )


def _check_agreement(positions: Tensor, sequences: PackedSequences) -> None:
    message = (
        "position_ids and the given lengths disagree on where sequences begin; "
        "leave one of the two out, or make the positions restart where a sequence begins"
    )
    try:
        # Checked on the device and without reading it back; on the CPU it raises here and now.
        torch._assert_async(starts_agree(positions, sequences), message)
    except RuntimeError as error:
        found = PackedSequences.from_position_ids(positions)
        if found != sequences:
            raise PadfreeError(f"{message} (positions: {found.lengths}, lengths: {sequences.lengths})") from error


def _check_rows(shape: tuple[int, int], sequences: PackedSequences) -> None:
    """Raises PadfreeError if a sequence runs from one row into the next."""
    rows, tokens = shape
    if rows == 1:
        return
    ends = set(itertools.accumulate(sequences.lengths))
    for row in range(1, rows):
        if row * tokens not in ends:
            raise PadfreeError(f"a sequence runs from row {row - 1} into row {row} of {rows} rows of {tokens} tokens")


def _checked_positions(position_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if position_ids is None or tuple(position_ids.shape) == shape:
        return position_ids
    if tuple(position_ids.shape) == (1, shape[1]):  # upstream broadcasts them over the rows
        return position_ids.expand(shape)
    raise PadfreeError(f"position_ids have shape {tuple(position_ids.shape)}, but the tokens have {shape}")


def _refuse_mask(attention_mask: Any, shape: tuple[int, int]) -> None:
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    raise PadfreeError(
        f"position_ids restart, so the batch is packed, but its attention_mask is {found} instead of {shape}; "
        "leave the mask out, the positions say it all"
    )


class _Ordinary:
    """The verdict on a batch that is not packed."""


ORDINARY = _Ordinary()


class _Cache:
    """The newest few verdicts, by the identity of the tensors that they were read from.

    A tensor counts as the same if its storage, version counter, shape, strides and device are: the detached copies that
    reentrant checkpointing hands to the layers share all of them. The tensors are held, so that their memory can't be
    reused for others meanwhile. Shared by all threads: the backward of a CUDA model runs in one of its own.
    """

    def __init__(self, entries: int = 32):
        self._entries = entries
        self._known: collections.OrderedDict[Any, tuple[PackedBatch | _Ordinary, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Any) -> PackedBatch | _Ordinary | None:
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][0]

    def keep(self, key: Any, verdict: PackedBatch | _Ordinary, tensors: Any) -> None:
        with self._lock:
            self._known[key] = (verdict, tensors)
            self._known.move_to_end(key)
            while len(self._known) > self._entries:
                self._known.popitem(last=False)


_cache = _Cache()


def _key(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.is_inference():  # no version counter, so no way to notice a change: never found again
        return object()
    return tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
