"""Times a training step on a model: padded, padding-free, and the ceiling."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import whole_number
from ..batch.labels import IGNORED_LABEL
from ..data.fields import Batch
from ..data.flattening import DataCollatorWithFlattening
from ..patching import applied
from ..registry import found_by_check, patch_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class StepBench:
    """Medians over interleaved steps (forward and backward) on one batch. Rates count real tokens, never padding."""

    lengths: tuple[int, ...]
    """Tokens per example: lognormal, median 90, from 8 to 512."""
    padding_share: float
    """Part of the padded batch that is padding."""
    padded_seconds: float
    padding_free_seconds: float
    ceiling_seconds: float
    """The same number of tokens in rows of equal length, unpatched."""

    @property
    def speedup(self) -> float:
        """Returns how many times as fast as padded padding-free is."""
        return self.padded_seconds / self.padding_free_seconds

    @property
    def ceiling_ratio(self) -> float:
        """Returns the speed of padding-free over that of the ceiling; 1 is as fast as these tokens can be."""
        return self.ceiling_seconds / self.padding_free_seconds

    def __str__(self) -> str:
        tokens = sum(self.lengths)
        seconds = (self.padded_seconds, self.padding_free_seconds, self.ceiling_seconds)
        lines = [
            f"{len(self.lengths)} examples, {tokens} tokens, {self.padding_share:.0%} of the padded batch is padding"
        ]
        for name, taken in zip(("padded", "padding-free", "ceiling"), seconds):
            lines.append(f"  {name:12} {taken:8.3f} s per step   {tokens / taken:9.0f} real tokens/s")
        lines.append(
            f"  padding-free is {self.speedup:.2f} x as fast as padded, {self.ceiling_ratio:.2f} of the ceiling"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Gives every field and the ratios, ready for JSON; padding-free's seconds have the name `packed_seconds`."""
        names = {"padding_free_seconds": "packed_seconds"}
        fields = {names.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return fields | {"speedup": self.speedup, "ceiling_ratio": self.ceiling_ratio}


def bench_step(model: PreTrainedModel, *, batch_size: int = 8, steps: int = 5) -> StepBench:
    """Times steps of a causal language model on random tokens; the model's gradients are dropped.

    Raises PadfreeError if there is no example or no step.
    """
    batch_size, steps = whole_number(batch_size, "batch_size", 1), whole_number(steps, "steps", 1)
    generator = torch.Generator().manual_seed(0)
    lengths = flan_like_lengths(batch_size, generator, longest=512)
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    batches = step_batches([torch.randint(vocabulary, (n,), generator=generator) for n in lengths], device)
    seconds: dict[str, list[float]] = {name: [] for name in ("padded", "packed", "ceiling")}
    for step in range(steps + 1):
        for name, times in seconds.items():
            taken = timed_step(model, batches[name], patched=name == "packed")
            if step:  # the first one warms up
                times.append(taken)
    return StepBench(
        lengths=lengths,
        padding_share=1 - batches["padded"]["attention_mask"].float().mean().item(),
        padded_seconds=statistics.median(seconds["padded"]),
        padding_free_seconds=statistics.median(seconds["packed"]),
        ceiling_seconds=statistics.median(seconds["ceiling"]),
    )


def flan_like_lengths(count: int, generator: torch.Generator, *, longest: int = 2048) -> tuple[int, ...]:
    """Draws tokens per example: lognormal, median 90, from 8 to `longest`."""
    drawn = torch.exp(torch.randn(count, generator=generator) + 4.5)
    return tuple(int(n) for n in drawn.clamp(8, longest))


def step_batches(examples: list[Tensor], device: torch.device | str = "cpu") -> dict[str, Batch]:
    """Makes batches of the same examples, int64 (tokens,) each and all trained on, in the ways a step can take them.

    padded: to the right, with a mask. packed: by our collator, with lengths. native: one row with position_ids, as
    transformers' own collator makes it. ceiling: as many tokens in rows of one length, except at most a row's rest.
    """
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": each} for each in examples])
    tokens = torch.cat(examples)
    equal = tokens[: len(tokens) // len(examples) * len(examples)].view(len(examples), -1)
    batches = {
        "padded": _padded_batch(examples),
        "packed": packed,
        "native": {name: packed[name] for name in ("input_ids", "labels", "position_ids")},
        "ceiling": {"input_ids": equal, "labels": equal},
    }
    return {
        name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for name, b in batches.items()
    }


def _padded_batch(examples: list[Tensor]) -> dict[str, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in examples])[:, None]).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, IGNORED_LABEL)}


def timed_step(
    model: PreTrainedModel,
    batch: Mapping[str, object],
    *,
    patched: bool,
    backend: str = "auto",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the seconds of one forward and backward in train mode; the gradients are dropped.

    Args:
        model: a causal language model.
        batch: what it is called on.
        patched: whether to apply the patch for this step.
        backend: with what the patch computes attention.
        clock: what reads the time; `time.process_time` counts this process's alone, of all its threads.
    """
    model.train()
    device = next(model.parameters()).device
    check = found_by_check(patch_for(model))
    with applied(model, verify=check, backend=backend) if patched else contextlib.nullcontext():
        taken = _seconds_of(lambda: model(**batch, use_cache=False).loss.backward(), device, clock)
    model.zero_grad(set_to_none=True)
    return taken


def _seconds_of(run: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    _wait_for(device)
    start = clock()
    run()
    _wait_for(device)
    return clock() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
