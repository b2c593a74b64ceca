"""FlexAttention's block mask for sequences that go on from shared prompts: a query sees the keys of its prompt too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..arguments import Integers
from ..batch.sequences import PackedSequences

if TYPE_CHECKING:  # older torch has none
    from torch.nn.attention.flex_attention import BlockMask


def block_mask_with_prompts(sequences: PackedSequences, window: int, block: int) -> BlockMask:
    """Makes the `BlockMask` (1, 1, T, T). The lengths of such sequences are known on the host, so no device sync."""
    from torch.nn.attention.flex_attention import BlockMask

    device = sequences.kernel_cu_seqlens().device
    begins, first, last = (torch.from_numpy(each).to(device, non_blocking=True) for each in _ranges(sequences))
    position = sequences.position_ids()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (key <= query) & (key >= begins[query])
        seen = inside | ((key >= first[query]) & (key < last[query]))
        return seen & (position[query] - position[key] < window) if window else seen

    needed = _needed_blocks(sequences, window, block)
    order = np.argsort(~needed, axis=1, kind="stable").astype(np.int32)  # the needed ones first
    counts, indices = (
        torch.from_numpy(each).to(device, non_blocking=True) for each in (needed.sum(1, dtype=np.int32), order)
    )
    total = sequences.total
    return BlockMask.from_kv_blocks(
        counts[None, None], indices[None, None], BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(total, total)
    )


def _ranges(sequences: PackedSequences) -> tuple[Integers, Integers, Integers]:
    """Returns int64 (T,) each: where a token's sequence begins, and where its prompt begins and ends (0, 0 if none)."""
    lengths, prefixes = np.array(sequences.lengths), np.array(sequences.prefixes)
    ends = np.cumsum(lengths)
    first, last = (np.where(prefixes < 0, 0, each[prefixes]) for each in (ends - lengths, ends))
    of_sequence = np.repeat(np.arange(len(lengths)), lengths)
    return (ends - lengths)[of_sequence], first[of_sequence], last[of_sequence]


def _needed_blocks(sequences: PackedSequences, window: int, block: int) -> npt.NDArray[np.bool_]:
    """Returns bool (query blocks, key blocks): whether a query of one sees a key of the other."""
    count = -(-sequences.total // block)
    needed = np.zeros((count, count), dtype=np.bool_)
    ends = np.cumsum(sequences.lengths).tolist()
    rows = [range(end - length, end) for end, length in zip(ends, sequences.lengths)]
    for queries, prefix in zip(rows, sequences.prefixes or ()):
        _mark(needed, queries, queries, 0, window=window, block=block)
        if prefix >= 0:  # as if the prompt stood right before the sequence
            _mark(needed, queries, rows[prefix], queries.start - rows[prefix].stop, window=window, block=block)
    return needed


def _mark(needed: npt.NDArray[np.bool_], queries: range, keys: range, shift: int, *, window: int, block: int) -> None:
    """Marks the blocks in which queries see keys, if keys were moved by `shift` tokens to where queries find them."""
    for at in range(queries.start // block, -(-queries.stop // block)):
        low, high = max(at * block, queries.start), min((at + 1) * block, queries.stop)
        oldest = max(keys.start, low - shift - window + 1) if window else keys.start
        stop = min(keys.stop, high - shift)
        if oldest < stop:
            needed[at, oldest // block : -(-stop // block)] = True
