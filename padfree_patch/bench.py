"""A quick look at what a training step costs on a model: padded, padding-free, and the ceiling."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .collators import DataCollatorWithFlattening
from .patching import applied


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
    examples = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).long()
    equal = torch.cat(examples)[: sum(lengths) // batch_size * batch_size].view(batch_size, -1)
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": each} for each in examples])
    batches: dict[str, dict[str, Any]] = {
        "padded": {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)},
        "packed": packed,
        "ceiling": {"input_ids": equal, "labels": equal},
    }
    batches = {
        name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for name, b in batches.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    model.train()
    for step in range(steps + 1):
        for name, batch in batches.items():
            if name == "packed":
                with applied(model, verify=False):
                    taken = _timed(lambda b=batch: model(**b).loss.backward(), device)  # type: ignore[misc]
            else:
                taken = _timed(lambda b=batch: model(**b, use_cache=False).loss.backward(), device)  # type: ignore[misc]
            if step:  # the first one warms up
                seconds[name].append(taken)
            model.zero_grad(set_to_none=True)
    medians = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    return StepBench(lengths=lengths, padding_share=1 - mask.float().mean().item(), **medians)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
