"""A batch sampler that fills batches by tokens, not by examples."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..errors import PadfreeError
from .packing_plan import best_fit_decreasing, check_lengths


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Yields batches of at most `max_tokens` tokens, for a collator that flattens them.

    Every example comes once per epoch. The number of batches is a multiple of `num_replicas`. To reach one, the batch
    with most examples is divided; if every batch holds a single example, the cheapest batch comes again. Each
    `num_replicas` batches that follow one another cost about the same attention, the sum of squared lengths, so that no
    process waits for another.

    Pass it as `batch_sampler=` to a DataLoader, with the process's `rank`. A loader that accelerate has prepared gives
    each process every `num_replicas`-th batch itself: leave `rank` out there, and pass its `even_batches=False`.

    With more examples than `window`, the number of batches differs a little from epoch to epoch.

    Args:
        lengths: tokens per example, from 1 to `max_tokens`.
        max_tokens: tokens that a batch holds at most.
        num_replicas: processes that train together.
        rank: which of them this is, from 0; None yields the batches of all.
        seed: of the random order, which differs from epoch to epoch (`set_epoch`).
        window: number of examples, drawn at random, among which batches are put together. A larger window fills
            batches better, a smaller one mixes the examples more.

    Raises PadfreeError if a length is out of range, there are fewer examples than replicas, or no such rank.
    """

    def __init__(
        self,
        lengths: Iterable[int],
        *,
        max_tokens: int,
        num_replicas: int = 1,
        rank: int | None = None,
        seed: int = 0,
        window: int = 8192,
    ):
        self.lengths = check_lengths(lengths, max_tokens)
        if num_replicas < 1 or (rank is not None and not 0 <= rank < num_replicas):
            raise PadfreeError(f"rank {rank} of num_replicas {num_replicas}: ranks go from 0 to num_replicas - 1")
        if window < 1:
            raise PadfreeError(f"window={window}: batches are put together among at least one example")
        if len(self.lengths) < num_replicas:
            raise PadfreeError(f"{len(self.lengths)} examples can't give {num_replicas} processes a batch each")
        self.max_tokens = max_tokens
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.window = window
        self._epoch, self._begun, self._skip, self._complete = 0, 0, 0, False
        self._planned: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Counts the batches that this rank gets in this epoch."""
        return len(self._batches_of_epoch()) // (1 if self.rank is None else self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        if self._complete:
            self.set_epoch(self._epoch + 1)
        batches = self._batches_of_epoch()
        if self.rank is not None:
            batches = batches[self.rank :: self.num_replicas]
        self._begun, self._skip = self._skip, 0
        for batch in batches[self._begun :]:
            self._begun += 1  # before the yield, so that a state saved after it counts this batch
            yield batch
        self._complete = True

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, from 0. Without a call, the pass after a complete one is of the next epoch."""
        if epoch != self._epoch:
            self._epoch, self._begun, self._skip = epoch, 0, 0
        self._complete = False

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """Returns the sampler itself: accelerate before 1.0 looks for `set_epoch` here."""
        return self

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, and how many of its batches this rank has yielded.

        A loader with workers takes a few batches ahead of the training (accelerate's loaders keep count themselves).
        """
        return {"epoch": self._epoch, "batches": self._begun, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a state: the next pass leaves out the batches that were yielded before it was saved.

        Raises PadfreeError if the state is of a sampler with other lengths or arguments, and so of another order.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise PadfreeError(f"the saved order has {name} {state.get(name)}, this sampler {value}")
        self._epoch, self._skip, self._complete = state["epoch"], state["batches"], False
        self._begun = self._skip

    def _settings(self) -> dict[str, int]:
        """Returns what the order depends on besides the epoch."""
        return {
            **{name: getattr(self, name) for name in ("seed", "max_tokens", "num_replicas", "window")},
            "lengths": zlib.crc32(self.lengths.tobytes()),
        }

    def _batches_of_epoch(self) -> list[list[int]]:
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = self._epoch, self._plan(np.random.default_rng((self.seed, self._epoch)))
        return self._planned[1]

    def _plan(self, generator: np.random.Generator) -> list[list[int]]:
        order = generator.permutation(len(self.lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            drawn = order[start : start + self.window]
            rows = best_fit_decreasing(self.lengths[drawn], self.max_tokens)
            batches += [drawn[row].tolist() for row in rows]
        while len(batches) % self.num_replicas:
            fullest = max(batches, key=len)
            if len(fullest) == 1:
                batches.append(min(batches, key=self._attention_cost))
            else:
                batches.remove(fullest)
                batches += [fullest[::2], fullest[1::2]]
        batches.sort(key=self._attention_cost)
        steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
        return [batch for i in generator.permutation(len(steps)) for batch in steps[i]]

    def _attention_cost(self, batch: list[int]) -> int:
        return int((self.lengths[batch] ** 2).sum())
