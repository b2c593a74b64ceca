"""What a padding-free run does, in the Trainer's log: tokens per second, sequences per row, padding saved, memory."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .boundaries import LENGTH_ARGUMENTS, read_batch
from .errors import PadfreeError
from .memory import peak_bytes


@dataclasses.dataclass
class _Counts:
    """Since the last log."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: int | torch.Tensor = 0
    """On the device while a mask was added up there, and read when it is logged."""
    rows: int = 0
    sequences: int = 0
    padded_tokens: int = 0
    """What the same examples would take, padded to the longest of their batch."""
    longest_row: int = 0


class PaddingFreeCallback(TrainerCallback):
    """Adds to each log of the Trainer what this process trained on since the last one.

    - `tokens_per_second`: real tokens; padding that a mask tells of is not counted,
    - `padding_saved`: part of the padded batches of the same examples that would be padding,
    - `sequences_per_row`, and `longest_row` in tokens,
    - `peak_memory_gib`: of the GPU, or of the process where there is none.

    They stand in `state.log_history`, and go to every tracker whose callback comes after this one. The Trainer puts its
    own (`report_to`) first: `PaddingFreeCallback().attach(trainer)` goes before them.

    Costs no device sync but the one with which the patched model reads the batch anyway, and one per log.

    Args:
        patience: training steps after which a run that never showed a row with a second sequence is stopped with a
            PadfreeError; 0 for never.
    """

    def __init__(self, *, patience: int = 10):
        self.patience = patience
        self._counts = _Counts()
        self._ever_packed = False
        self._steps = 0
        self._hook: Any = None

    def attach(self, trainer: Any) -> PaddingFreeCallback:
        """Becomes the first callback of a Trainer, so that the log of every tracker holds these figures too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is None:
            raise PadfreeError("PaddingFreeCallback: the Trainer gave no model to watch")
        self._unhook()  # of a run that an error ended
        self._counts, self._ever_packed, self._steps = _Counts(), False, 0
        self._hook = model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        if self.patience and self._steps >= self.patience and not self._ever_packed:
            self._unhook()
            raise PadfreeError(
                f"{self._steps} training steps, and no row held a second sequence: this run is not packed. Is the "
                "data_collator one that flattens (padfree_patch.DataCollatorWithFlattening), and is the batch size "
                "more than 1? PaddingFreeCallback(patience=0) lets it run"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        counts = self._counts
        if logs is None or self._hook is None or not counts.rows:  # an evaluation's log, or the summary at the end
            return
        tokens = int(counts.tokens)
        figures = {
            "tokens_per_second": round(tokens / (time.perf_counter() - counts.began), 1),
            "padding_saved": round(1 - tokens / counts.padded_tokens, 4),
            "sequences_per_row": round(counts.sequences / counts.rows, 2),
            "longest_row": counts.longest_row,
            "peak_memory_gib": round(_peak_bytes() / 2**30, 3),
        }
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._counts = _Counts()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _watch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts a training batch on its way into the model."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if not model.training or not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            return
        rows, length = int(tokens.shape[0]), int(tokens.shape[1])
        mask = kwargs.get("attention_mask")
        batch = read_batch(
            (rows, length),
            tokens.device,
            position_ids=kwargs.get("position_ids"),
            attention_mask=mask,
            lengths={name: kwargs[name] for name in LENGTH_ARGUMENTS if kwargs.get(name) is not None},
        )
        counts = self._counts
        counts.rows += rows
        counts.longest_row = max(counts.longest_row, length)
        counts.tokens += tokens.numel() if mask is None or mask.shape != tokens.shape else (mask != 0).sum()
        if batch is None:
            counts.sequences += rows
            counts.padded_tokens += tokens.numel()
            return
        self._ever_packed = True
        counts.sequences += len(batch.sequences)
        counts.padded_tokens += len(batch.sequences) * batch.sequences.max_seqlen


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()
