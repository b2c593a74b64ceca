"""What a padding-free run does, in the Trainer's log: tokens per second, sequences per row, padding saved, memory."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..batch.labels import IGNORED_LABEL
from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import read_batch
from ..data.samplers import TokenBudgetBatchSampler
from ..errors import PadfreeError
from ..measure.memory import peak_bytes
from ..patching import check_no_virtual_tokens, is_applied


@dataclasses.dataclass
class _Counts:
    """Since the last log."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: int | torch.Tensor = 0
    """On the device, like the two below, where a mask or labels tell padding there; read when it is logged."""
    rows: int = 0
    sequences: int | torch.Tensor = 0
    padded_tokens: int | torch.Tensor = 0
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

    A packed batch that reaches a model which is not patched is a PadfreeError, and so is a PEFT adapter with virtual
    tokens. A `TokenBudgetBatchSampler` is told which epoch begins.

    Costs no device sync but the one with which the patched model reads the batch anyway, and a few per log.

    Args:
        patience: training steps after which a run that never showed a row with a second sequence is stopped with a
            PadfreeError; 0 for never.
    """

    def __init__(self, *, patience: int = 10):
        self.patience = patience
        self._counts = _Counts()
        self._packed: int | torch.Tensor = 0
        self._steps = 0
        self._last_step = 0.0
        self._is_patched = False
        self._hook: Any = None

    def attach(self, trainer: Any) -> PaddingFreeCallback:
        """Becomes the first callback of a Trainer, so that the log of every tracker holds these figures too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is None:
            raise PadfreeError("PaddingFreeCallback: the Trainer gave no model to watch")
        self._unhook()  # of a run that an error ended
        check_no_virtual_tokens(model)  # which may have come after apply
        self._counts, self._packed, self._steps = _Counts(), 0, 0
        self._last_step = self._counts.began  # of none yet: an evaluation may come first
        self._is_patched = is_applied(model)
        self._hook = model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        sampler = getattr(train_dataloader, "batch_sampler", None)
        if isinstance(sampler, TokenBudgetBatchSampler):  # loaders that accelerate has not prepared don't tell it
            sampler.set_epoch(int((state.epoch or 0) + 1e-6))  # epochs done, and a part after resuming

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        self._last_step = time.perf_counter()
        if self.patience and self._steps == self.patience and not int(self._packed):
            self._unhook()
            raise PadfreeError(
                f"{self._steps} training steps, and no row held a second sequence: this run is not packed. Is the "
                "data_collator one that flattens (padfree_patch.DataCollatorWithFlattening), and is the batch size "
                "more than 1? PaddingFreeCallback(patience=0) lets it run"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        counts = self._counts
        # An evaluation's log and the summary at the end have no training loss.
        if logs is None or "loss" not in logs or self._hook is None or not counts.rows:
            return
        tokens = int(counts.tokens)
        figures = {
            "tokens_per_second": round(tokens / (time.perf_counter() - counts.began), 1),
            "padding_saved": round(1 - tokens / int(counts.padded_tokens), 4),
            "sequences_per_row": round(int(counts.sequences) / counts.rows, 2),
            "longest_row": counts.longest_row,
            "peak_memory_gib": round(_peak_bytes() / 2**30, 3),
        }
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._counts = _Counts()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counts.began += time.perf_counter() - self._last_step  # that was no training

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _watch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts a training batch on its way into the model."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if not model.training or not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
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
        if batch is None:
            counts.tokens += rows * length if mask is None or mask.shape != (rows, length) else (mask != 0).sum()
            counts.sequences += rows
            counts.padded_tokens += rows * length
            return
        if not self._is_patched:
            raise PadfreeError(
                f"{type(model).__name__} is given packed rows, but it is not patched; call padfree_patch.apply(model) "
                "before the training"
            )
        sequences, last = batch.sequences, batch.sequences.lengths[-1]
        labels = kwargs.get("labels")
        padding: Any = 0  # or 1: whether the last sequence is what a collator added to reach a multiple
        if isinstance(labels, torch.Tensor) and last > 1:
            padding = (labels.reshape(-1)[-last:] == IGNORED_LABEL).all().long()
        counts.tokens += sequences.total - padding * last
        counts.sequences += len(sequences) - padding
        counts.padded_tokens += (len(sequences) - padding) * sequences.max_seqlen
        self._packed = self._packed + (len(sequences) - padding > rows)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()
