"""Which sequences a batch holds: worked out once per forward, found again by every layer.

The position_ids tensor that reaches a layer is the truth; the cache only saves the time (and the device sync) of
reading it again. A context set around the model's forward would not do: it is gone when gradient checkpointing
recomputes a layer in the backward, and wrong when a second batch went forward before the first one's backward. What a
miss costs is one sync, never a wrong result: the positions that the layers get show every boundary.
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
from torch._subclasses.fake_tensor import FakeTensor

from .errors import PadfreeError
from .packing import PackedSequences, Reading, agrees, begins_of, read_segments, read_tensors

LENGTH_ARGUMENTS = ("packed_sequences", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What a collator may give beside position_ids; taken out of the call before upstream's forward could refuse it."""


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch of which at least one row holds several sequences."""

    sequences: PackedSequences
    position_ids: Tensor
    """int64 (B, T), a tensor of our own that nobody else changes; it restarts wherever a sequence begins."""

    @functools.cached_property
    def positions_from_zero(self) -> Tensor:
        """int64 (B, T): position_ids as if every sequence began at 0."""
        return self.sequences.position_ids().view(self.position_ids.shape)

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
    attention_mask: Any,
    lengths: Mapping[str, Any],
    generating: bool = False,
) -> PackedBatch | None:
    """The sequences of a batch, or None if it is an ordinary one, which upstream serves as it is.

    Args:
        shape: (B, T) of the tokens.
        device: of the tokens.
        position_ids: (B, T), (1, T) or None.
        attention_mask: what the caller gave; 2-D masks are read, of wider ones (with a cache) the last T columns.
        lengths: those of `LENGTH_ARGUMENTS` that the caller gave.
        generating: whether a cache came along, so that equal positions at the start of a row are left padding.

    Raises PadfreeError if what was given contradicts itself or the shape. Reads the device once, not at all with
    lengths from our collator, and not at all if there is neither a position nor an integer mask.
    """
    positions = _checked_positions(position_ids, shape)
    mask = _mask_of_tokens(attention_mask, shape, generating)
    if any(tensor is not None and _unreadable(tensor) for tensor in (positions, mask)):
        return None  # traced on fake tensors: there are no values, and so no examples
    if lengths:
        if attention_mask is not None and mask is None:
            raise _mask_refused(attention_mask, shape)
        return _read_lengths(shape, device, positions, mask, lengths)
    if positions is None and (mask is None or mask.dtype == torch.bool):
        _check_no_segments(attention_mask, mask, shape)
        return None  # nothing here could tell one example from the next
    if positions is not None and isinstance(ours := _cache.find(_own_key(positions)), PackedBatch):
        return ours  # the head of the model has read them
    key = _users_key(positions), _users_key(mask), generating
    known = _cache.find(key)
    if known is None:
        left_padded = generating or (attention_mask is not None and mask is None)
        known = _read(positions, mask, shape, device, left_padded=left_padded)
        _cache.keep(key, known, (positions, mask))
    if isinstance(known, PackedBatch) and attention_mask is not None and mask is None:
        raise _mask_refused(attention_mask, shape)
    return known if isinstance(known, PackedBatch) else None


def batch_at_layer(position_ids: Tensor | None) -> PackedBatch:
    """The packed batch to which the position_ids (B, T) that reach one of its layers belong."""
    if position_ids is None:
        raise PadfreeError("no position_ids reached the attention of a packed batch; they say where its sequences end")
    key = _own_key(position_ids)
    known = _cache.find(key)
    if known is None:
        rows, tokens = position_ids.shape
        known = _read(position_ids, None, (rows, tokens), position_ids.device)
        _cache.keep(key, known, (position_ids,))
    if isinstance(known, _Ordinary):
        raise PadfreeError("the layers of a packed batch were given position_ids that never restart")
    return known


def _read(
    positions: Tensor | None,
    mask: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    *,
    left_padded: bool = False,
) -> PackedBatch | _Ordinary:
    found = read_tensors(positions, mask, left_padded=left_padded)
    return ORDINARY if found is None else _packed(found, positions, shape, device)


def _packed(found: Reading, positions: Tensor | None, shape: tuple[int, int], device: torch.device) -> PackedBatch:
    """The batch with position_ids of its own, under which the layers find the sequences again without a sync."""
    sequences = PackedSequences.from_lengths(found.lengths, device=device)
    return _batch(sequences, positions if found.shown else None, shape)


def _batch(sequences: PackedSequences, positions: Tensor | None, shape: tuple[int, int]) -> PackedBatch:
    with torch.inference_mode(False):  # inference tensors have no version counter
        own = sequences.position_ids() if positions is None else positions.to(torch.int64, copy=True)
        batch = PackedBatch(sequences, own.reshape(shape))
    _cache.keep(_own_key(batch.position_ids), batch, (batch.position_ids,))
    return batch


def _read_lengths(
    shape: tuple[int, int],
    device: torch.device,
    positions: Tensor | None,
    mask: Tensor | None,
    lengths: Mapping[str, Any],
) -> PackedBatch | None:
    sequences = _sequences_from(lengths, shape, device)
    if positions is not None:
        _check(
            agrees(positions, sequences),
            "position_ids and the given lengths disagree on where sequences begin; leave one of the two out, or let "
            "the positions restart where a sequence begins",
            lambda: PackedSequences.from_position_ids(positions).lengths,
            sequences,
        )
    if mask is not None:  # its padding, or its segments, are read beside the lengths
        found = read_tensors(sequences.position_ids().view(shape), mask)
        return None if found is None else _packed(found, None, shape, device)
    if len(sequences) == shape[0] and sequences.max_seqlen == shape[1]:
        return None  # every row is one sequence
    return _batch(sequences, positions, shape)


def _sequences_from(lengths: Mapping[str, Any], shape: tuple[int, int], device: torch.device) -> PackedSequences:
    """The sequences that all given dialects agree on.

    Compared on the host where they are known there, otherwise on the device, without reading it.
    """
    total = shape[0] * shape[1]
    longest = {name: int(lengths[name]) for name in ("max_length_q", "max_length_k") if name in lengths}
    found: dict[str, PackedSequences] = {}
    if (packed := lengths.get("packed_sequences")) is not None:
        if not isinstance(packed, PackedSequences):
            raise PadfreeError(f"packed_sequences must be PackedSequences, found {type(packed).__name__}")
        if packed.total != total:
            raise PadfreeError(f"the lengths cover {packed.total} tokens, but the batch has {total}")
        found["packed_sequences"] = packed.to(device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if (cu_seqlens := lengths.get(name)) is None:
            continue
        _check_whole(name, cu_seqlens)
        if not found:
            largest = next(iter(longest.values()), None)
            found[name] = PackedSequences.from_cu_seqlens(cu_seqlens, max_seqlen=largest, total=total, device=device)
            continue
        first, known = next(iter(found.items()))
        same = torch.as_tensor(cu_seqlens).reshape(-1).to(device)
        if same.shape != known.cu_seqlens.shape:
            raise PadfreeError(f"{first} holds {len(known)} sequences, {name} {same.numel() - 1}")
        message = f"{first} and {name} disagree"
        _check((same == known.cu_seqlens).all(), message, lambda s=same: tuple(s.diff().tolist()), known)
    seq_idx = lengths.get("seq_idx")
    if not found and seq_idx is not None:
        found["seq_idx"] = PackedSequences.from_lengths(read_segments(seq_idx), device=device, total=total)
    if not found:
        raise PadfreeError(f"{', '.join(longest)} without cu_seq_lens_q: a maximum does not say where sequences end")
    first, sequences = next(iter(found.items()))
    if seq_idx is not None and first != "seq_idx":
        changes = begins_of(seq_idx.to(device), lambda now, before: now != before)
        message = f"{first} and seq_idx disagree"
        _check(agrees(changes, sequences), message, lambda: tuple(read_segments(seq_idx)), sequences)
    for name, value in longest.items():
        if value != sequences.max_seqlen:
            raise PadfreeError(f"{name} is {value}, but the longest sequence has {sequences.max_seqlen} tokens")
    _check_rows(shape, sequences)
    return sequences


def _check_whole(name: str, cu_seqlens: Any) -> None:
    """Raises PadfreeError for lengths that a loader took for a tensor with a batch dimension."""
    if torch.as_tensor(cu_seqlens).numel() == 1:
        raise PadfreeError(
            f"{name} has a single value: a loader cut it like a batch, as accelerate's does when it deals batches out "
            "(its default for an IterableDataset). Pass the Trainer accelerator_config={'dispatch_batches': False} "
            "(dispatch_batches=False before 4.38), or the collator return_flash_attn_kwargs=False"
        )


def _check(good: Tensor, message: str, other: Any, sequences: PackedSequences) -> None:
    """Raises PadfreeError with both sides unless `good`, a bool tensor of one element, is true.

    Checked on the device and without reading it back (on CUDA the error is the device's own); on the CPU here and now.
    """
    try:
        torch._assert_async(good, message)
    except RuntimeError as error:
        if (found := other()) != sequences.lengths:  # or the device can't assert
            raise PadfreeError(f"{message} ({found} against {sequences.lengths})") from error


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


def _mask_of_tokens(attention_mask: Any, shape: tuple[int, int], generating: bool) -> Tensor | None:
    """The part of a 2-D mask that is about the tokens of this call; None if there is none."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0]:
        return None
    if generating and attention_mask.shape[1] > shape[1]:  # it begins with what is in the cache
        return attention_mask[:, -shape[1] :]
    return attention_mask if attention_mask.shape[1] == shape[1] else None


def _check_no_segments(attention_mask: Any, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises PadfreeError if a mask of another shape holds segment numbers: they can't be meant for these tokens."""
    wrong = isinstance(attention_mask, Tensor) and mask is None and attention_mask.dim() == 2
    if wrong and attention_mask.dtype != torch.bool and not _unreadable(attention_mask) and attention_mask.max() > 1:
        raise PadfreeError(f"attention_mask holds segment numbers of shape {tuple(attention_mask.shape)} for {shape}")


def _mask_refused(attention_mask: Any, shape: tuple[int, int]) -> PadfreeError:
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    return PadfreeError(
        f"the batch is packed, but its attention_mask is {found} instead of {shape}; leave the mask out, "
        "what says where the sequences end says it all"
    )


def _unreadable(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


class _Ordinary:
    """The verdict on a batch that is not packed."""


ORDINARY = _Ordinary()


class _Cache:
    """The newest few verdicts, by the identity of the tensors that they were read from.

    The tensors are held, so that their memory can't be reused for others meanwhile. Shared by all threads: the backward
    of a CUDA model runs in one of its own.
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


def _own_key(tensor: Tensor) -> Any:
    """The same for all views of a tensor that share storage, version counter, shape and strides.

    The detached copies that reentrant checkpointing hands to the layers do.
    """
    if tensor.is_inference():  # no version counter, so no way to notice a change: never found again
        return object()
    return tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _users_key(tensor: Tensor | None) -> Any:
    """As `_own_key` for a caller's tensor, but never found again on the CPU.

    There reading costs nothing, and numpy may have changed the memory without a trace.
    """
    if tensor is None:
        return None
    return object() if tensor.device.type == "cpu" else _own_key(tensor)
