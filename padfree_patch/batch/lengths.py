"""Lengths that a collator gives beside the tokens: every form is read as PackedSequences, and all must agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PadfreeError
from .boundaries import lengths_of_segments
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
    longest = {name: int(lengths[name]) for name in ("max_length_q", "max_length_k") if name in lengths}
    first, sequences = _first_form(lengths, next(iter(longest.values()), None), shape[0] * shape[1], device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in lengths and name != first:
            _check_cu_seqlens(first, sequences, name, lengths[name])
    if "seq_idx" in lengths and first != "seq_idx":
        seq_idx = lengths["seq_idx"].to(device)
        changes = begins_of(seq_idx, lambda now, before: now != before)
        message = f"{first} and seq_idx disagree"
        check_equal(agrees(changes, sequences), message, lambda: tuple(lengths_of_segments(seq_idx)), sequences)
    for name, value in longest.items():
        if value != sequences.max_seqlen:
            raise PadfreeError(f"{name} is {value}, but the longest sequence has {sequences.max_seqlen} tokens")
    _check_rows(shape, sequences)
    return sequences


def _first_form(lengths: Lengths, longest: int | None, total: int, device: torch.device) -> tuple[str, PackedSequences]:
    """Returns the first form that says where sequences end, by name; the others are compared with it."""
    if "packed_sequences" in lengths:
        return "packed_sequences", _checked(lengths["packed_sequences"], total).to(device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in lengths:
            _check_whole(name, lengths[name])
            found = PackedSequences.from_cu_seqlens(lengths[name], max_seqlen=longest, total=total, device=device)
            return name, found
    if "seq_idx" in lengths:
        found = PackedSequences.from_lengths(lengths_of_segments(lengths["seq_idx"]), device=device, total=total)
        return "seq_idx", found
    raise PadfreeError(f"{', '.join(lengths)} without cu_seq_lens_q: a maximum does not say where sequences end")


def begins_of(values: Tensor, begins: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns bool (B, T): True at the start of every row and where `begins(value, the one before)`. Reads nothing."""
    first = torch.ones_like(values[:, :1], dtype=torch.bool)
    return torch.cat([first, begins(values[:, 1:], values[:, :-1])], dim=1)


def agrees(positions_or_begins: Tensor, sequences: PackedSequences) -> Tensor:
    """Returns a bool of one element: whether `sequences` begin exactly where the tensor says. Reads nothing.

    Args:
        positions_or_begins: positions (B, T), which restart where a sequence begins, or bool (B, T), True there.
        sequences: with B * T tokens.
    """
    begins = positions_or_begins
    if begins.dtype != torch.bool:
        begins = begins_of(begins, lambda now, before: now != before + 1)
    expected = torch.zeros(begins.numel(), dtype=torch.bool, device=begins.device)
    return (begins.reshape(-1) == expected.index_fill_(0, sequences.cu_seqlens[:-1].long(), True)).all()


def check_equal(good: Tensor, message: str, other: Callable[[], tuple[int, ...]], sequences: PackedSequences) -> None:
    """Raises PadfreeError with both sides unless `good`, a bool tensor of one element, is true.

    The device checks it without a sync, and on CUDA the error is the device's own; on the CPU it is checked here.

    Args:
        good: whether `sequences` and the other side agree.
        message: what disagrees.
        other: the lengths on the other side; called only if they disagree.
        sequences: one side.
    """
    try:
        torch._assert_async(good, message)
    except RuntimeError as error:
        if (found := other()) != sequences.lengths:  # or the device can't assert
            raise PadfreeError(f"{message} ({found} against {sequences.lengths})") from error


def _checked(packed: object, total: int) -> PackedSequences:
    if not isinstance(packed, PackedSequences):
        raise PadfreeError(f"packed_sequences must be PackedSequences, found {type(packed).__name__}")
    if packed.total != total:
        raise PadfreeError(f"the lengths cover {packed.total} tokens, but the batch has {total}")
    return packed


def _check_cu_seqlens(first: str, sequences: PackedSequences, name: str, cu_seqlens: Any) -> None:
    """Raises PadfreeError unless cumulative lengths say what `sequences`, read from `first`, say."""
    _check_whole(name, cu_seqlens)
    same = torch.as_tensor(cu_seqlens).reshape(-1).to(sequences.cu_seqlens.device)
    if same.shape != sequences.cu_seqlens.shape:
        raise PadfreeError(f"{first} holds {len(sequences)} sequences, {name} {same.numel() - 1}")
    good = (same == sequences.cu_seqlens).all()
    check_equal(good, f"{first} and {name} disagree", lambda: tuple(same.diff().tolist()), sequences)


def _check_whole(name: str, cu_seqlens: Any) -> None:
    """Raises PadfreeError for lengths that a loader took for a tensor with a batch dimension."""
    if torch.as_tensor(cu_seqlens).numel() == 1:
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
    ends = set(itertools.accumulate(sequences.lengths))
    for row in range(1, rows):
        if row * tokens not in ends:
            raise PadfreeError(f"a sequence runs from row {row - 1} into row {row} of {rows} rows of {tokens} tokens")
