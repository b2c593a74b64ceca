"""A quick look at what a training step costs on a model: padded, padding-free, and the ceiling."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.flattening import DataCollatorWithFlattening
from ..patching import applied


@dataclasses.dataclass(frozen=True)
class StepBench:
    """Medians over interleaved steps (forward and backward) on one batch. Rates count real tokens, never padding."""

    lengths: tuple[int, ...]
    """Tokens per example: lognormal, median 90, from 8 to 512."""
    padding_share: float
    """Part of the padded batch that is padding."""
    padded_seconds: float
    packed_seconds: float
    ceiling_seconds: float
    """The same number of tokens in rows of equal length, unpatched."""

    @property
    def speedup(self) -> float:
        """Padding-free over padded."""
        return self.padded_seconds / self.packed_seconds

    def __str__(self) -> str:
        tokens = sum(self.lengths)
        lines = [
            f"{len(self.lengths)} examples, {tokens} tokens, {self.padding_share:.0%} of the padded batch is padding"
        ]
        for name in ("padded", "packed", "ceiling"):
            seconds = getattr(self, f"{name}_seconds")
            lines.append(f"  {name:8} {seconds:8.3f} s per step   {tokens / seconds:9.0f} real tokens/s")
        lines.append(
            f"  padding-free is {self.speedup:.2f} x as fast as padded, {self.ceiling_ratio:.2f} of the ceiling"
        )
        return "\n".join(lines)

    @property
    def ceiling_ratio(self) -> float:
        """Padding-free over the ceiling; 1 is as fast as these tokens can be."""
        return self.ceiling_seconds / self.packed_seconds


def bench_step(model: Any, *, batch_size: int = 8, steps: int = 5) -> StepBench:
    """Times steps of a causal language model on random tokens; the model's gradients are dropped."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp(torch.randn(batch_size, generator=generator) + 4.5)  # lognormal, median 90
    lengths = tuple(int(n) for n in drawn.clamp(8, 512))
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    batches = step_batches([torch.randint(vocabulary, (n,), generator=generator) for n in lengths], device)
    mask = batches["padded"]["attention_mask"]
    seconds: dict[str, list[float]] = {name: [] for name in ("padded", "packed", "ceiling")}
    for step in range(steps + 1):
        for name, times in seconds.items():
            taken = timed_step(model, batches[name], patched=name == "packed")
            if step:  # the first one warms up
                times.append(taken)
    medians = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    return StepBench(lengths=lengths, padding_share=1 - mask.float().mean().item(), **medians)


def step_batches(examples: list[Tensor], device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """The same examples, int64 (tokens,) each and all trained on, in the ways that a step can take them.

    padded: to the right, with a mask. packed: by our collator, with lengths. native: one row with position_ids, as
    transformers' own collator makes it. ceiling: as many tokens, less at most a row's rest, in rows of one length.
    """
    padded = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in examples])[:, None]).long()
    tokens = torch.cat(examples)
    equal = tokens[: len(tokens) // len(examples) * len(examples)].view(len(examples), -1)
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": each} for each in examples])
    batches: dict[str, dict[str, Any]] = {
        "padded": {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)},
        "packed": packed,
        "native": {name: packed[name] for name in ("input_ids", "labels", "position_ids")},
        "ceiling": {"input_ids": equal, "labels": equal},
    }
    return {
        name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for name, b in batches.items()
    }


def timed_step(model: Any, batch: dict[str, Any], *, patched: bool) -> float:
    """Seconds of one forward and backward in train mode, with or without the patch; the gradients are dropped."""
    model.train()
    device = next(model.parameters()).device
    with applied(model, verify=False) if patched else contextlib.nullcontext():
        taken = _timed(lambda: model(**batch, use_cache=False).loss.backward(), device)
    model.zero_grad(set_to_none=True)
    return taken


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
