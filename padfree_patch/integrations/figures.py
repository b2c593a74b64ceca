"""What a run trains on, counted batch by batch: the figures of a log, and what tells whether the run is packed."""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..measure.memory import peak_bytes

MOST_SECONDS = 300.0
"""How long a process waits for the others to begin the training."""

FIGURES = ("tokens_per_second", "padding_saved", "sequences_per_row", "longest_row", "peak_memory_gib")
"""What is added to a log, by name."""


@dataclasses.dataclass
class Counts:
    """What was counted since the last log. A count is a device tensor if padding had to be counted on the device.

    Such a tensor is read only when a log is written.
    """

    began: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: int | Tensor = 0
    rows: int = 0
    sequences: int | Tensor = 0
    padded_tokens: int | Tensor = 0
    """Tokens of the same examples if each were padded to the longest of its batch."""
    longest_row: int = 0

    def figures(self, device: torch.device) -> dict[str, float] | None:
        """Returns what goes into the log, of all processes; None if none has trained. Reads the device."""
        seconds = time.perf_counter() - self.began  # before the processes wait for each other
        counted = [float(each) for each in (self.tokens, self.rows, self.sequences, self.padded_tokens)]
        tokens, rows, sequences, padded_tokens = of_all_processes(counted, device)
        mine = [seconds, float(self.longest_row), _peak_bytes()]
        seconds, longest_row, peak = of_all_processes(mine, device, largest=True)
        if not rows:
            return None
        values = (
            round(tokens / seconds, 1),
            round(1 - tokens / padded_tokens, 4),
            round(sequences / rows, 2),
            int(longest_row),
            round(peak / 2**30, 3),
        )
        return dict(zip(FIGURES, values))

    def add_ordinary(self, rows: int, length: int, mask: Tensor | None) -> None:
        """Counts a batch of rows with one example each."""
        self.tokens += real_tokens(rows, length, mask)
        self.sequences += rows
        self.padded_tokens += rows * length

    def add_packed(self, batch: PackedBatch, padding: int | Tensor) -> None:
        """Counts a packed batch, without its last sequence if `padding` is 1."""
        whole = batch.sequences.whole_lengths
        lengths = [whole[i] for i in batch.sequences.examples]
        sequences = len(lengths) - padding
        self.tokens += batch.sequences.total - padding * lengths[-1]
        self.sequences += sequences
        self.padded_tokens += sequences * max(lengths[:-1] if batch.sequences.padding else lengths)


def real_tokens(rows: int, length: int, mask: Tensor | None) -> int | Tensor:
    """Counts the tokens of a batch that a mask does not call padding. Reads nothing from the device."""
    if mask is None or mask.shape != (rows, length):
        return rows * length
    return (mask != 0).sum()


def of_all_processes(values: list[float], device: torch.device, *, largest: bool = False) -> list[float]:
    """Returns each value's sum over the processes of a run, or the largest; all processes must ask at once."""
    if not _are_several():
        return values
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return together.tolist()


def ends_with_padding(batch: PackedBatch, mask: Tensor | None) -> int | Tensor:
    """Returns 1 if a collator of ours, or a mask, says that the last sequence is padding; 0 if not. Reads no device."""
    if batch.sequences.padding:
        return 1
    return 0 if mask is None or mask.dim() != 2 else (mask[-1, -1] == 0).long()


def check_all_begin(key: str) -> None:
    """Waits until all processes of a run have come here, as often as this one, with the same key.

    They meet in the store of the process group. What only some processes begin with the group itself hangs, or is
    taken for another's operation.

    Raises PadfreeError if some do not come.
    """
    store = dist.distributed_c10d._get_default_store() if _are_several() else None
    if store is None:  # MPI has none
        return
    key, processes = f"padfree_patch/{key}", dist.get_world_size()
    times = store.add(f"{key}/{dist.get_rank()}", 1)
    store.add(key, 1)
    end = time.monotonic() + MOST_SECONDS
    while (begun := store.add(key, 0)) < times * processes:
        if time.monotonic() > end:
            raise PadfreeError(
                f"PaddingFreeCallback sums its figures over all {processes} processes, but only "
                f"{begun - (times - 1) * processes} began the training with one within {MOST_SECONDS:g} s: give the "
                "Trainer of every process the callback, with the same patience"
            )
        time.sleep(0.02)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _peak_bytes() -> float:
    return float(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes())
