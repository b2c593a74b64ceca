"""A callback that adds to the Trainer's log what a padding-free run does: speed, padding saved, memory."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..batch.labels import IGNORED_LABEL
from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import PackedBatch, read_batch
from ..data.samplers import TokenBudgetBatchSampler
from ..errors import PadfreeError
from ..measure.memory import peak_bytes
from ..patching import check_no_virtual_tokens, is_applied
from ..seams.model_call import tokens_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


@dataclasses.dataclass
class _Counts:
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

    def figures(self) -> dict[str, float]:
        """Returns what goes into the log. Reads the device."""
        tokens = int(self.tokens)
        return {
            "tokens_per_second": round(tokens / (time.perf_counter() - self.began), 1),
            "padding_saved": round(1 - tokens / int(self.padded_tokens), 4),
            "sequences_per_row": round(int(self.sequences) / self.rows, 2),
            "longest_row": self.longest_row,
            "peak_memory_gib": round(_peak_bytes() / 2**30, 3),
        }

    def add_ordinary(self, rows: int, length: int, mask: Tensor | None) -> None:
        """Counts a batch of rows with one example each."""
        has_mask = mask is not None and mask.shape == (rows, length)
        self.tokens += (mask != 0).sum() if mask is not None and has_mask else rows * length
        self.sequences += rows
        self.padded_tokens += rows * length

    def add_packed(self, batch: PackedBatch, padding: int | Tensor) -> None:
        """Counts a packed batch, without its last sequence if `padding` is 1."""
        sequences = len(batch.sequences) - padding
        self.tokens += batch.sequences.total - padding * batch.sequences.lengths[-1]
        self.sequences += sequences
        self.padded_tokens += sequences * batch.sequences.max_seqlen


class PaddingFreeCallback(TrainerCallback):
    """Adds to each log of the Trainer what this process trained on since the last one.

    - `tokens_per_second`: real tokens; padding that a mask shows is not counted,
    - `padding_saved`: the share of padding in padded batches of the same examples,
    - `sequences_per_row`, and `longest_row` in tokens,
    - `peak_memory_gib`: of the GPU, or of the process where there is none.

    They are in `state.log_history`, and go to every tracker whose callback comes after this one. The Trainer puts its
    own (`report_to`) first: `PaddingFreeCallback().attach(trainer)` goes before them.

    A packed batch for a model that is not patched is a PadfreeError, and so is a PEFT adapter with virtual tokens. At
    the beginning of an epoch the callback sets the epoch of a `TokenBudgetBatchSampler`.

    The only device syncs are a few per log, and the one with which the patched model reads the batch anyway.

    Args:
        patience: training steps after which a run that never showed a row with a second sequence is stopped with a
            PadfreeError; 0 for never.
    """

    def __init__(self, *, patience: int = 10):
        self.patience = patience
        self._counts = _Counts()
        self._packed: int | Tensor = 0
        self._steps = 0
        self._last_step = 0.0
        self._is_patched = False
        self._hook: RemovableHandle | None = None

    def attach(self, trainer: Trainer) -> PaddingFreeCallback:
        """Becomes the first callback of a Trainer, so that the log of every tracker holds these figures too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        if model is None:
            raise PadfreeError("PaddingFreeCallback: the Trainer gave no model to watch")
        self._unhook()  # of a run that an error ended
        check_no_virtual_tokens(model)  # which may have come after apply
        self._counts, self._packed, self._steps = _Counts(), 0, 0
        self._last_step = self._counts.began  # of none yet: an evaluation may come first
        self._is_patched = is_applied(model)
        self._hook = model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: object = None,
        **_: object,
    ) -> None:
        sampler = getattr(train_dataloader, "batch_sampler", None)
        if isinstance(sampler, TokenBudgetBatchSampler):  # a loader that accelerate has not prepared never sets it
            sampler.set_epoch(int((state.epoch or 0) + 1e-6))  # epochs done, and a part after resuming

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._steps += 1
        self._last_step = time.perf_counter()
        if self.patience and self._steps == self.patience and not int(self._packed):
            self._unhook()
            raise PadfreeError(
                f"{self._steps} training steps, and no row held a second sequence: this run is not packed. Is the "
                "data_collator one that flattens (padfree_patch.DataCollatorWithFlattening), and is the batch size "
                "more than 1? PaddingFreeCallback(patience=0) lets it run"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        # An evaluation's log and the summary at the end have no training loss.
        if logs is None or "loss" not in logs or self._hook is None or not self._counts.rows:
            return
        figures = self._counts.figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._counts = _Counts()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._counts.began += time.perf_counter() - self._last_step  # which was no training

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _watch(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Counts a training batch on its way into the model.

        Raises PadfreeError if it is packed and the model is not patched.
        """
        tokens = tokens_of({**kwargs, "input_ids": args[0]} if args else kwargs)
        if not model.training or tokens is None or tokens.dim() < 2:
            return
        rows, length = int(tokens.shape[0]), int(tokens.shape[1])
        batch = read_batch(
            (rows, length),
            tokens.device,
            position_ids=kwargs.get("position_ids"),
            attention_mask=kwargs.get("attention_mask"),
            lengths={name: kwargs[name] for name in LENGTH_ARGUMENTS if kwargs.get(name) is not None},
        )
        self._counts.rows += rows
        self._counts.longest_row = max(self._counts.longest_row, length)
        if batch is None:
            self._counts.add_ordinary(rows, length, kwargs.get("attention_mask"))
            return
        if not self._is_patched:
            raise PadfreeError(
                f"{type(model).__name__} is given packed rows, but it is not patched; call padfree_patch.apply(model) "
                "before the training"
            )
        padding = _ends_with_padding(batch, kwargs.get("labels"))
        self._counts.add_packed(batch, padding)
        self._packed = self._packed + (len(batch.sequences) - padding > rows)


def _ends_with_padding(batch: PackedBatch, labels: Tensor | None) -> int | Tensor:
    """Returns 1 if the last sequence is what a collator added to reach a multiple, and 0 if not. Reads no device."""
    last = batch.sequences.lengths[-1]
    if not isinstance(labels, Tensor) or last == 1:
        return 0
    return (labels.reshape(-1)[-last:] == IGNORED_LABEL).all().long()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()
