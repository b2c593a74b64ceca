"""A batch sampler that fills batches by tokens, not by examples."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ..arguments import whole_number
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

    Raises PadfreeError if a length is out of range, there are fewer examples than replicas or no such rank, or an
    argument is no whole number.
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
        self.max_tokens = whole_number(max_tokens, "max_tokens", 1)
        self.num_replicas = whole_number(num_replicas, "num_replicas", 1)
        self.rank = None if rank is None else whole_number(rank, "rank")
        self.seed = whole_number(seed, "seed", 0)
        self.window = whole_number(window, "window", 1)
        self.lengths = check_lengths(lengths, self.max_tokens)
        if self.rank is not None and not 0 <= self.rank < self.num_replicas:
            raise PadfreeError(f"rank {rank} of num_replicas {num_replicas}: ranks go from 0 to num_replicas - 1")
        if len(self.lengths) < self.num_replicas:
            raise PadfreeError(f"{len(self.lengths)} examples can't give {num_replicas} processes a batch each")
        self._epoch, self._begun, self._skip, self._complete = 0, 0, 0, False
        self._planned: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Counts the batches that this rank gets in this epoch; once it has yielded them all, in the next."""
        return self._count(self._epoch + self._complete)

    def __iter__(self) -> Iterator[list[int]]:
        if self._complete:
            self.set_epoch(self._epoch + 1)
        batches = self._batches_of(self._epoch)
        if self.rank is not None:
            batches = batches[self.rank :: self.num_replicas]
        self._begun, self._skip = self._skip, 0
        self._complete = self._begun == len(batches)
        for batch in batches[self._begun :]:
            # Before the yield: a state saved after it counts this batch, and whoever takes `len` batches, as Trainers
            # from 4.46 on, never comes back after the last one.
            self._begun += 1
            self._complete = self._begun == len(batches)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, from 0. Without a call, the pass after a complete one is of the next epoch."""
        epoch = whole_number(epoch, "epoch", 0)
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

        If these were all batches of an epoch, the next pass is of the next epoch.

        Raises PadfreeError if the state is of a sampler with other lengths or arguments, and so of another order, or if
        it is no state of a sampler.
        """
        if not isinstance(state, Mapping) or not {"epoch", "batches"} <= set(state):
            raise PadfreeError(f"a sampler's state has epoch and batches, found {state!r:.200}")
        for name, value in self._settings().items():
            if not isinstance(state.get(name), int) or state[name] != value:
                raise PadfreeError(f"the saved order has {name} {state.get(name)!r:.80}, this sampler {value}")
        epoch, done = whole_number(state["epoch"], "epoch", 0), whole_number(state["batches"], "batches", 0)
        if done > (count := self._count(epoch)):
            raise PadfreeError(f"the saved state has yielded {done} batches of epoch {epoch}, which has {count}")
        self._epoch, self._begun, self._skip, self._complete = epoch, done, done, done == count

    def _settings(self) -> dict[str, int]:
        """Returns what the order depends on besides the epoch."""
        return {
            **{name: getattr(self, name) for name in ("seed", "max_tokens", "num_replicas", "window")},
            "lengths": zlib.crc32(self.lengths.tobytes()),
        }

    def _count(self, epoch: int) -> int:
        """Counts the batches that this rank gets in an epoch."""
        return len(self._batches_of(epoch)) // (1 if self.rank is None else self.num_replicas)

    def _batches_of(self, epoch: int) -> list[list[int]]:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(np.random.default_rng((self.seed, epoch)))
        return self._planned[1]

    def _plan(self, generator: np.random.Generator) -> list[list[int]]:
        order = generator.permutation(len(self.lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            drawn = order[start : start + self.window]
            rows = best_fit_decreasing(self.lengths[drawn], self.max_tokens)
            batches += [drawn[row].tolist() for row in rows]
        batches = self._in_whole_steps(batches)
        batches = [batches[place] for place in np.argsort(self._attention_costs(batches), kind="stable")]
        steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
        return [batch for i in generator.permutation(len(steps)) for batch in steps[i]]

    def _in_whole_steps(self, batches: list[list[int]]) -> list[list[int]]:
        """Returns as many batches for every replica: the fullest ones are divided, or the cheapest is repeated."""
        missing = -len(batches) % self.num_replicas
        fullest_first = [(-len(batch), place) for place, batch in enumerate(batches)]
        heapq.heapify(fullest_first)
        divided: set[int] = set()
        while missing and fullest_first[0][0] < -1:
            _, place = heapq.heappop(fullest_first)
            divided.add(place)
            for half in (batches[place][::2], batches[place][1::2]):
                heapq.heappush(fullest_first, (-len(half), len(batches)))
                batches.append(half)
            missing -= 1
        kept = [batch for place, batch in enumerate(batches) if place not in divided]
        return kept + [kept[int(self._attention_costs(kept).argmin())]] * missing if missing else kept

    def _attention_costs(self, batches: list[list[int]]) -> npt.NDArray[np.int64]:
        """Returns the sum of squared lengths of each batch."""
        sizes = np.array([len(batch) for batch in batches])
        return np.add.reduceat(self.lengths[np.concatenate(batches)] ** 2, np.cumsum(sizes) - sizes)
