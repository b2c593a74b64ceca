"""PackedSequences, the one type that says where the sequences of a batch begin and end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PadfreeError
from .boundaries import host_values, lengths_of_mask, lengths_of_positions


class PackedSequences:
    """Where the sequences of a packed batch begin and end, counted over its B * T tokens row after row.

    >>> packed = PackedSequences.from_lengths([2, 4, 3])
    >>> packed.cu_seqlens.tolist(), packed.max_seqlen, packed.total
    ([0, 2, 6, 9], 4, 9)
    """

    __slots__ = ("_lengths", "cu_seqlens", "derived", "max_seqlen", "total")

    cu_seqlens: Tensor
    """int32 (sequences + 1,), from 0 to total, on the device of the tokens."""
    max_seqlen: int
    """Tokens in the longest sequence."""
    total: int
    """Tokens in all of them together."""
    derived: dict[str, Any]
    """What backends work out from the sequences, by name, so that the next layer need not."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total: int, lengths: tuple[int, ...] | None = None):
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.total = total
        self._lengths = lengths
        self.derived = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence. Costs one device sync if only device-side cu_seqlens were given, else none."""
        if self._lengths is None:
            self._lengths = tuple(np.diff(host_values(self.cu_seqlens)).tolist())
        return self._lengths

    def cheapest_cu_seqlens(self) -> Tensor:
        """Returns `cu_seqlens` on the CPU if the lengths are known there, else where they are. No device sync."""
        if self._lengths is None:
            return self.cu_seqlens
        return torch.from_numpy(np.cumsum((0, *self._lengths), dtype=np.int32))

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedSequences) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"PackedSequences({len(self)} sequences, {self.total} tokens, longest {self.max_seqlen})"

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedSequences:
        """Returns the same sequences with `cu_seqlens` on another device; data loaders call this to move a batch."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return PackedSequences(cu_seqlens, self.max_seqlen, self.total, self._lengths)

    def position_ids(self) -> Tensor:
        """Returns int64 (total,): 0, 1, 2, ... restarting at every sequence. No device sync."""
        starts = self.cu_seqlens.long()
        repeats = starts.diff()
        offsets = torch.repeat_interleave(starts[:-1], repeats, output_size=self.total)
        return torch.arange(self.total, device=offsets.device) - offsets

    @classmethod
    def from_lengths(
        cls, lengths: Iterable[int], *, device: torch.device | str | None = None, total: int | None = None
    ) -> PackedSequences:
        """Makes them from tokens per sequence.

        Args:
            lengths: positive integers.
            device: where `cu_seqlens` goes.
            total: tokens that the lengths must cover, if known.

        Raises PadfreeError if there is no sequence, one is empty, or they do not add up to `total`.
        """
        lengths = tuple(int(length) for length in lengths)
        if not lengths:
            raise PadfreeError("no sequences: the list of lengths is empty")
        if min(lengths) < 1:
            where = next(i for i, length in enumerate(lengths) if length < 1)
            raise PadfreeError(f"sequence {where} has length {lengths[where]}; leave empty sequences out")
        covered = sum(lengths)
        if total is not None and covered != total:
            raise PadfreeError(f"the lengths cover {covered} tokens, but the batch has {total}")
        cu_seqlens = torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))
        return cls(cu_seqlens.to(device or "cpu", non_blocking=True), max(lengths), covered, lengths)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        *,
        max_seqlen: int | None = None,
        total: int | None = None,
        device: torch.device | str | None = None,
    ) -> PackedSequences:
        """Makes them from cumulative lengths such as [0, 2, 6, 9].

        With `max_seqlen`, `total` and device-side `cu_seqlens` nothing is read back: the values are checked on the
        device (`torch._assert_async`). Otherwise they are read once.

        Args:
            cu_seqlens: integers (sequences + 1,), from 0 to the number of tokens; a leading dimension of 1 is dropped.
            max_seqlen: tokens in the longest sequence.
            total: tokens that must be covered.
            device: where `cu_seqlens` goes; where it is if not given.

        Raises PadfreeError unless they start at 0, increase, end at `total`, and agree with `max_seqlen`.
        """
        cu = torch.as_tensor(cu_seqlens)
        cu = cu.reshape(-1) if cu.dim() == 2 and cu.shape[0] == 1 else cu
        if cu.dim() != 1 or cu.numel() < 2 or cu.is_floating_point():
            raise PadfreeError(f"cu_seqlens must be integers (sequences + 1,), found {cu.dtype} {tuple(cu.shape)}")
        if cu.device.type != "cpu" and max_seqlen is not None and total is not None:
            lengths = cu.diff()
            good = (cu[0] == 0) & (cu[-1] == total) & (lengths.min() > 0) & (lengths.max() == max_seqlen)
            torch._assert_async(good, f"cu_seqlens do not fit {total} tokens with max_seqlen {max_seqlen}")
            return cls(cu.to(device or cu.device, torch.int32), int(max_seqlen), total)
        values = cu.numpy() if cu.device.type == "cpu" else host_values(cu)
        if values[0] != 0:
            raise PadfreeError(f"cu_seqlens start at {values[0]}, not at 0")
        packed = cls.from_lengths(np.diff(values).tolist(), device=device or cu.device, total=total)
        if max_seqlen is not None and max_seqlen != packed.max_seqlen:
            raise PadfreeError(f"max_length is {max_seqlen}, but the longest sequence has {packed.max_seqlen} tokens")
        return packed

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> PackedSequences:
        """Reads positions (T,) or (B, T) that restart, at any number, where a sequence begins. One device sync.

        >>> PackedSequences.from_position_ids(torch.tensor([[5, 6, 0, 1, 2, 0, 0]])).lengths
        (2, 3, 1, 1)
        """
        return cls.from_lengths(lengths_of_positions(position_ids), device=position_ids.device)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> PackedSequences:
        """Reads a mask (T,) or (B, T): 0/1, or the number of the sequence that a token belongs to, 0 for padding.

        Every stretch of padding is one sequence of its own. One device sync.

        >>> PackedSequences.from_attention_mask(torch.tensor([[1, 1, 2, 2, 2, 0, 0]])).lengths
        (2, 3, 2)
        >>> PackedSequences.from_attention_mask(torch.tensor([[1, 1, 1], [0, 1, 1]])).lengths
        (3, 1, 2)
        """
        return cls.from_lengths(lengths_of_mask(attention_mask), device=attention_mask.device)
