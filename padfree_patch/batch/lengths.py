"""Lengths that a collator gives beside the tokens: every form is read as PackedSequences, and all must agree."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PadfreeError
from .boundaries import lengths_of_positions, lengths_of_segments
from .host import check_on_device, widened
from .sequences import PackedSequences

LENGTH_ARGUMENTS = ("packed_sequences", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What a collator may give beside position_ids; taken out of the call before upstream's forward could refuse it."""

Lengths = Mapping[str, Any]
"""Some of `LENGTH_ARGUMENTS`, by name, none of them None."""


def sequences_of(lengths: Lengths, shape: tuple[int, int], device: torch.device) -> PackedSequences:
    """Returns the sequences that all given lengths agree on.

    Compared on the host where they are known there, else on the device, without reading it.

    Args:
        lengths: at least one of `LENGTH_ARGUMENTS`.
        shape: (B, T) of the tokens.
        device: of the tokens.

    Raises PadfreeError if they contradict each other or the shape.
    """
    maxima = {name: lengths[name] for name in ("max_length_q", "max_length_k") if name in lengths}
    if "packed_sequences" not in lengths:  # which know their own maximum
        maxima = {name: _integer(name, value) for name, value in maxima.items()}
    seq_idx = _checked_seq_idx(lengths["seq_idx"], shape) if "seq_idx" in lengths else None
    first, sequences = _first_form(lengths, seq_idx, maxima, shape, device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in lengths and name != first:
            _check_cu_seqlens(first, sequences, name, lengths[name])
    if seq_idx is not None and first != "seq_idx":
        _check_seq_idx(first, sequences, seq_idx, shape)
    for name, value in maxima.items():
        _check_maximum(name, value, sequences)
    _check_rows(shape, sequences)
    return sequences


def begins_of(sequences: PackedSequences, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Returns bool (B, T) on a device, True where a sequence begins. No device sync."""
    begins = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=device)
    return begins.index_fill_(0, sequences.begins().to(device), True).view(shape)


def agrees(positions: Tensor, sequences: PackedSequences, mask: Tensor | None = None) -> Tensor:
    """Returns bool (): whether positions go up inside each sequence, by any step, and break where one begins.

    Where a sequence goes on from a shared prompt, its first position must be the prompt's last plus one. Without a
    device sync.

    Args:
        positions: (B, T), of any dtype.
        sequences: with B * T tokens, of which every row begins one.
        mask: (B, T), 0 for padding, whose positions may be anything; or None.
    """
    values = widened(positions)
    begins = begins_of(sequences, (values.shape[0], values.shape[1]), values.device)
    now, before = values[:, 1:], values[:, :-1]
    good = torch.where(begins[:, 1:], now != before + 1, now > before)
    if sequences.prefixes is not None:
        return _agrees_with_prompts(values.reshape(-1), good, sequences)
    if mask is not None:
        good |= (mask[:, 1:] == 0) | (mask[:, :-1] == 0)
    return good.all()


def _agrees_with_prompts(positions: Tensor, good: Tensor, sequences: PackedSequences) -> Tensor:
    """Returns bool (): whether positions (B * T,) are `good`, (B, T - 1), except that branches go on from prompts."""
    branches, prompts = zip(*((i, prefix) for i, prefix in enumerate(sequences.prefixes or ()) if prefix >= 0))
    ends = list(itertools.accumulate(sequences.lengths))
    first, last = ([ends[i] - sequences.lengths[i] for i in branches], [ends[i] - 1 for i in prompts])
    first_, last_ = (torch.tensor(each, device="cpu").to(positions.device, non_blocking=True) for each in (first, last))
    flat = torch.nn.functional.pad(good, (1, 0), value=True).reshape(-1).index_fill(0, first_, True)
    return flat.all() & (positions[first_] == positions[last_] + 1).all()


def check_positions(positions: Tensor, sequences: PackedSequences, mask: Tensor | None) -> None:
    """Raises PadfreeError unless positions (B, T) of real tokens agree with the sequences. Without a device sync."""
    message = (
        "position_ids and the given lengths disagree on where sequences begin; leave one of the two out, or let "
        "the positions restart where a sequence begins"
    )
    good = agrees(positions, sequences, mask)
    check_on_device(good, message, lambda: f"({tuple(lengths_of_positions(positions))} against {sequences.lengths})")


def check_no_mask_beside_prompts(lengths: Lengths, attention_mask: object) -> None:
    """Raises PadfreeError for a mask beside lengths with shared prompts, of which no mask could say anything."""
    given = lengths.get("packed_sequences")
    if isinstance(given, PackedSequences) and given.prefixes is not None and attention_mask is not None:
        raise PadfreeError(
            "an attention_mask came beside packed_sequences whose examples share prompts; leave the mask out, because "
            "packed_sequences say all"
        )


def _first_form(
    lengths: Lengths,
    seq_idx: Tensor | None,
    maxima: Lengths,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[str, PackedSequences]:
    """Returns the first form that says where sequences end, by name; the others are compared with it."""
    total = shape[0] * shape[1]
    if "packed_sequences" in lengths:
        return "packed_sequences", _checked(lengths["packed_sequences"], total).to(device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in lengths:
            _check_not_cut(name, lengths[name])
            longest = min(maxima.values(), default=None)
            found = PackedSequences.from_cu_seqlens(lengths[name], max_seqlen=longest, total=total, device=device)
            return name, found
    if seq_idx is not None:
        return "seq_idx", PackedSequences.from_lengths(lengths_of_segments(seq_idx), device=device, total=total)
    raise PadfreeError(f"{', '.join(lengths)} without cu_seq_lens_q: a maximum does not say where sequences end")


def _check_maximum(name: str, value: object, sequences: PackedSequences) -> None:
    """Raises PadfreeError if a maximum is less than the longest sequence. A tensor on a device is not read."""
    longest = sequences.max_seqlen
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        check_on_device((value >= longest).all(), f"{name} is too small: the longest sequence has {longest} tokens")
    elif (number := _integer(name, value)) < longest:
        raise PadfreeError(f"{name} is {number}, but the longest sequence has {longest} tokens")


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]  # whatever the caller gave
    except TypeError as error:
        raise PadfreeError(f"{name} must be an integer, found {str(value)[:80]}") from error


def _checked(packed: object, total: int) -> PackedSequences:
    if not isinstance(packed, PackedSequences):
        raise PadfreeError(f"packed_sequences must be PackedSequences, found {type(packed).__name__}")
    if packed.total != total:
        raise PadfreeError(f"the lengths cover {packed.total} tokens, but the batch has {total}")
    return packed


def _checked_seq_idx(seq_idx: object, shape: tuple[int, int]) -> Tensor:
    if not isinstance(seq_idx, Tensor):
        raise PadfreeError(f"seq_idx must be a tensor {shape}, found {type(seq_idx).__name__}")
    if tuple(seq_idx.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
        raise PadfreeError(f"seq_idx has shape {tuple(seq_idx.shape)}, but the tokens have {shape}")
    return seq_idx.reshape(shape)


def _check_seq_idx(first: str, sequences: PackedSequences, seq_idx: Tensor, shape: tuple[int, int]) -> None:
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    good = (changes == begins_of(sequences, shape, seq_idx.device)[:, 1:]).all()
    message = f"{first} and seq_idx disagree"
    check_on_device(good, message, lambda: f"({sequences.lengths} against {tuple(lengths_of_segments(seq_idx))})")


def _check_cu_seqlens(first: str, sequences: PackedSequences, name: str, cu_seqlens: Tensor | Sequence[int]) -> None:
    """Raises PadfreeError unless cumulative lengths say what `sequences`, read from `first`, say."""
    _check_not_cut(name, cu_seqlens)
    on_device = isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu"
    longest = sequences.max_seqlen if on_device else None  # known, nothing has to be read there
    here = sequences.kernel_cu_seqlens().device
    other = PackedSequences.from_cu_seqlens(cu_seqlens, max_seqlen=longest, total=sequences.total, device=here)
    message = f"{first} and {name} disagree"
    check_on_device(sequences.agrees_with(other), message, lambda: f"({sequences.lengths} against {other.lengths})")


def _check_not_cut(name: str, cu_seqlens: object) -> None:
    """Raises PadfreeError for lengths that a loader took for a tensor with a batch dimension."""
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.numel() == 1:
        raise PadfreeError(
            f"{name} has a single value: a loader cut it like a batch, as accelerate's does when it deals batches out "
            "(its default for an IterableDataset). Pass the Trainer accelerator_config={'dispatch_batches': False} "
            "(dispatch_batches=False before 4.38), or the collator return_flash_attn_kwargs=False"
        )


def _check_rows(shape: tuple[int, int], sequences: PackedSequences) -> None:
    """Raises PadfreeError if a sequence runs from one row into the next."""
    rows, tokens = shape
    if rows == 1:
        return
    _check_prompts_in_row(tokens, sequences)
    ends = set(itertools.accumulate(sequences.lengths))
    for row in range(1, rows):
        if row * tokens not in ends:
            raise PadfreeError(f"a sequence runs from row {row - 1} into row {row} of {rows} rows of {tokens} tokens")


def _check_prompts_in_row(tokens: int, sequences: PackedSequences) -> None:
    """Raises PadfreeError if a sequence goes on from a prompt in another row of so many tokens."""
    rows = [(end - 1) // tokens for end in itertools.accumulate(sequences.lengths)]
    for sequence, prefix in enumerate(sequences.prefixes or ()):
        if prefix >= 0 and rows[prefix] != rows[sequence]:
            raise PadfreeError(
                f"sequence {sequence} in row {rows[sequence]} goes on from a prompt in row {rows[prefix]}; a prompt "
                "must stand in the row of the examples that share it"
            )
