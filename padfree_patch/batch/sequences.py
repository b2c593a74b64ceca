"""PackedSequences, the one type that says where the sequences of a batch begin and end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import whole_number
from ..errors import PadfreeError
from .boundaries import lengths_of_mask, lengths_of_positions
from .cumulative import MOST_TOKENS, as_integers, checked_lengths, cumulated, without_repeats
from .host import check_on_device, host_values, values_on_cpu
from .prefixes import Prefixes, checked_prefixes, prefix_lengths


class PackedSequences:
    """Where the sequences of a packed batch begin and end, counted over its B * T tokens row after row.

    Checked when it is made; nothing can change it afterwards. With `prefixes`, some of the sequences are prompts that
    others go on from (`padfree_patch.batch.prefixes`).

    >>> packed = PackedSequences.from_lengths([2, 4, 3])
    >>> packed.cu_seqlens.tolist(), packed.max_seqlen, packed.total
    ([0, 2, 6, 9], 4, 9)
    """

    __slots__ = ("_cu_seqlens", "_derived", "_lengths", "_max_seqlen", "_padding", "_prefixes", "_total")

    _cu_seqlens: Tensor
    _derived: dict[str, Any]
    _lengths: tuple[int, ...] | None
    _max_seqlen: int
    _padding: int
    _prefixes: Prefixes | None
    _total: int

    def __init__(
        self,
        cu_seqlens: Tensor,
        max_seqlen: int,
        total: int,
        lengths: tuple[int, ...] | None = None,
        padding: int = 0,
        prefixes: Iterable[int] | None = None,
    ):
        """Makes them from all that there is to know. Raises PadfreeError if the arguments contradict each other."""
        max_seqlen, total = whole_number(max_seqlen, "max_seqlen"), whole_number(total, "total")
        padding = whole_number(padding, "padding")
        made = PackedSequences.from_cu_seqlens(cu_seqlens, max_seqlen=max_seqlen, total=total)
        if lengths is not None or padding or prefixes is not None:
            lengths, device = made.lengths if lengths is None else lengths, made._cu_seqlens.device
            given = self.from_lengths(lengths, device=device, total=total, padding=padding, prefixes=prefixes)
            check_on_device(made.agrees_with(given), f"PackedSequences: cu_seqlens do not hold the lengths {lengths}")
            made = given
        for name in PackedSequences.__slots__:
            setattr(self, name, getattr(made, name))

    @classmethod
    def _checked(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        total: int,
        lengths: tuple[int, ...] | None,
        padding: int = 0,
        prefixes: Prefixes | None = None,
    ) -> PackedSequences:
        """Makes them from what is known to be right, and a tensor that nobody else holds."""
        self = cls.__new__(cls)
        self._cu_seqlens, self._max_seqlen, self._total, self._lengths = cu_seqlens, max_seqlen, total, lengths
        self._padding, self._prefixes, self._derived = padding, prefixes, {}
        return self

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (sequences + 1,), from 0 to total, on the device of the tokens: a copy, which may be written to.

        If only the device knows the lengths, the last value may stand there several times, as it was given.
        """
        return self._cu_seqlens.clone()

    @property
    def max_seqlen(self) -> int:
        """Tokens in the longest sequence; if only the device knows the lengths, what was given as their maximum."""
        return self._max_seqlen

    @property
    def total(self) -> int:
        """Tokens in all of them together."""
        return self._total

    @property
    def padding(self) -> int:
        """Tokens of the last sequence if it is padding, which a collator added to reach a multiple; 0 if not."""
        return self._padding

    @property
    def prefixes(self) -> Prefixes | None:
        """For each sequence the number of the one that it goes on from, -1 for none; None if none goes on."""
        return self._prefixes

    @property
    def examples(self) -> tuple[int, ...]:
        """The numbers of the sequences that are examples: all except the prompts that others go on from."""
        prompts = frozenset(self._prefixes or ())
        return tuple(i for i in range(len(self)) if i not in prompts)

    @property
    def whole_lengths(self) -> tuple[int, ...]:
        """Tokens per sequence together with those that it goes on from. Costs a device sync where `lengths` does."""
        return tuple(map(sum, zip(self.lengths, prefix_lengths(self.lengths, self._prefixes))))

    @property
    def derived(self) -> dict[str, Any]:
        """What backends work out from the sequences, by name, so that the next layer need not."""
        return self._derived

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence. Costs one device sync if only device-side cu_seqlens were given, else none."""
        if self._lengths is None:
            self._lengths = tuple(np.diff(without_repeats(host_values(self._cu_seqlens))).tolist())
            self._cu_seqlens = self._cu_seqlens[: len(self._lengths) + 1]
        return self._lengths

    def kernel_cu_seqlens(self) -> Tensor:
        """Returns `cu_seqlens` itself, for kernels, which are called in every layer and only read it."""
        return self._cu_seqlens

    def cheapest_cu_seqlens(self) -> Tensor:
        """Returns a copy of `cu_seqlens` on the CPU if the lengths are known there, else where they are."""
        return self.cu_seqlens if self._lengths is None else cumulated(self._lengths)

    def begins(self) -> Tensor:
        """Returns int64 (sequences,): where each begins. No device sync.

        If only the device knows the lengths, the first token may be named several times.
        """
        return self._cu_seqlens[:-1].long() % self._total

    def ends(self) -> Tensor:
        """Returns int64 (sequences,): the last token of each. No device sync; the last may be named several times."""
        return self._cu_seqlens[1:].long() - 1

    def __len__(self) -> int:
        """Returns how many there are. Costs a device sync where `lengths` does."""
        return len(self.lengths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedSequences):
            return False
        return (self.lengths, self.prefixes) == (other.lengths, other.prefixes)

    def __hash__(self) -> int:
        return hash((self.lengths, self.prefixes))

    def __repr__(self) -> str:
        prompts = f", {len(self) - len(self.examples)} of them shared prompts" if self.prefixes else ""
        return f"PackedSequences({len(self)} sequences{prompts}, {self.total} tokens, longest {self.max_seqlen})"

    def __reduce__(self) -> tuple[object, ...]:
        return PackedSequences, (self._cu_seqlens, self._max_seqlen, self._total, *self._on_host())

    def _on_host(self) -> tuple[tuple[int, ...] | None, int, Prefixes | None]:
        return self._lengths, self._padding, self._prefixes

    def agrees_with(self, other: PackedSequences) -> Tensor:
        """Returns bool (): whether both, of as many tokens, hold the same sequences. No device sync."""
        if self._lengths is not None and other._lengths is not None:
            return torch.tensor(self._lengths == other._lengths, device="cpu")
        here = self._cu_seqlens.device
        both = [torch.zeros(self._total + 1, dtype=torch.bool, device=here) for _ in range(2)]
        mine, its = (
            each.index_fill_(0, cu.to(here, torch.int64), True)
            for each, cu in zip(both, (self._cu_seqlens, other._cu_seqlens))
        )
        return (mine == its).all()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedSequences:
        """Returns the same sequences with `cu_seqlens` on another device; data loaders call this to move a batch."""
        cu_seqlens = self._cu_seqlens.to(device, non_blocking=non_blocking)
        return PackedSequences._checked(cu_seqlens, self._max_seqlen, self._total, *self._on_host())

    def position_ids(self) -> Tensor:
        """Returns int64 (total,): 0, 1, 2, ... restarting at every sequence; one with a prefix goes on from that.

        No device sync.
        """
        starts = self._cu_seqlens.long()
        begins = starts[:-1]
        if self._prefixes is not None:
            before = torch.tensor(prefix_lengths(self.lengths, self._prefixes), device="cpu")
            begins = begins - before.to(begins.device, non_blocking=True)
        offsets = torch.repeat_interleave(begins, starts.diff(), output_size=self._total)
        return torch.arange(self._total, device=offsets.device) - offsets

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int],
        *,
        device: torch.device | str | None = None,
        total: int | None = None,
        padding: int = 0,
        prefixes: Iterable[int] | None = None,
    ) -> PackedSequences:
        """Makes them from tokens per sequence.

        Args:
            lengths: positive integers.
            device: where `cu_seqlens` goes.
            total: tokens that the lengths must cover, if known.
            padding: tokens of the last sequence if it is padding, else 0.
            prefixes: for each sequence the number of the earlier one that it goes on from, -1 for none: a prompt that
                several examples share, without its last token, with which each of them begins. None: none goes on.

        Raises PadfreeError if there is no sequence, one is empty, they do not add up to `total`, the last one is not
        of `padding` tokens, or a prefix is no earlier sequence without a prefix.

        >>> shared = PackedSequences.from_lengths([3, 2, 4], prefixes=[-1, 0, 0])
        >>> shared.position_ids().tolist(), shared.examples, shared.whole_lengths
        ([0, 1, 2, 3, 4, 3, 4, 5, 6], (1, 2), (3, 5, 7))
        """
        counted = checked_lengths(lengths, total, padding)
        known = checked_prefixes(prefixes, len(counted))
        cu_seqlens = cumulated(counted).to(device or "cpu", non_blocking=True)
        return cls._checked(cu_seqlens, max(counted), sum(counted), counted, padding, known)

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
                The last value may be repeated, as is done where shapes must not change from batch to batch.
            max_seqlen: tokens in the longest sequence, or more.
            total: tokens that must be covered.
            device: where `cu_seqlens` goes; where it is if not given.

        Raises PadfreeError unless they start at 0, increase, end at `total`, and none exceeds `max_seqlen`.
        """
        cu = as_integers(cu_seqlens)
        if cu.device.type != "cpu" and max_seqlen is not None and total is not None:
            return cls._from_device(cu.clone(), max_seqlen, total).to(device or cu.device)
        known = values_on_cpu(cu)
        values = without_repeats(host_values(cu) if known is None else known)
        if values[0] != 0:
            raise PadfreeError(f"cu_seqlens start at {values[0]}, not at 0")
        packed = cls.from_lengths(np.diff(values).tolist(), device=device or cu.device, total=total)
        if max_seqlen is not None and max_seqlen < packed.max_seqlen:
            raise PadfreeError(f"max_length is {max_seqlen}, but the longest sequence has {packed.max_seqlen} tokens")
        return packed

    @classmethod
    def _from_device(cls, cu: Tensor, max_seqlen: int, total: int) -> PackedSequences:
        """Makes them from values that only the device knows, and that the device checks."""
        if not (0 < total <= MOST_TOKENS and max_seqlen > 0):
            raise PadfreeError(f"cu_seqlens do not fit {total} tokens with max_seqlen {max_seqlen}")
        cu, longest = cu.long(), min(max_seqlen, total)
        lengths = cu.diff()
        fit = (lengths > 0) | ((lengths == 0) & (cu[:-1] == total))
        good = (cu[0] == 0) & (cu[-1] == total) & fit.all() & (lengths.max() <= longest)
        check_on_device(good, f"cu_seqlens do not fit {total} tokens with max_seqlen {max_seqlen}")
        return cls._checked(cu.int(), longest, total, None)

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
