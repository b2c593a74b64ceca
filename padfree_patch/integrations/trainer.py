"""A callback that adds to the Trainer's log what a padding-free run does: speed, padding saved, memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerCallback

from ..adapters import check_adapters
from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import read_batch
from ..data.samplers import TokenBudgetBatchSampler
from ..door.verifying import patch_to_train, verify_once
from ..errors import PadfreeError
from ..patching import is_applied
from ..seams.model_call import tokens_of
from ..upstream import Arguments
from .diagnosis import Seen, causes
from .figures import FIGURES, Counts, check_all_begin, ends_with_padding, of_all_processes, real_tokens
from .trackers import calling_trainer, put_first, show_in_notebooks

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class PaddingFreeCallback(TrainerCallback):
    """Adds to each log of the Trainer what the run trained on since the last one, on all its processes.

    - `tokens_per_second`: real tokens; padding that a mask shows is not counted,
    - `padding_saved`: the share of padding in padded batches of the same examples,
    - `sequences_per_row`, and `longest_row` in tokens,
    - `peak_memory_gib`: of the GPU, or of the process where there is none; the largest of all processes.

    They are in `state.log_history`, in every tracker (`report_to`) and in a notebook's table, whether the
    callback was given as `callbacks=[...]`, by `add_callback` or by `attach`: when the training begins, it becomes the
    first of the callbacks.

    A packed batch for a model that is not patched is a PadfreeError, and so is a PEFT adapter that can't serve one. At
    the beginning of an epoch the callback sets the epoch of a `TokenBudgetBatchSampler`.

    The only device syncs are a few per log, and the one with which the patched model reads the batch anyway. Of several
    processes (each with batches of its own), a log has the sums; so the Trainer of every process must have the
    callback: with it on some only, the training is an error.

    Args:
        apply: patch the Trainer's model when the Trainer is made, and verify it when the training begins, on the device
            and with the backend that trains; a line on rank 0 says so. What `padfree_patch.apply` refuses is an error.
            Give the callback as `callbacks=[...]`: `add_callback` comes after the Trainer was made.
        patience: training steps after which a run that never showed a row with a second sequence is stopped with a
            PadfreeError, which says what the callback saw; 0 for never.
    """

    def __init__(self, *, apply: bool = False, patience: int = 10):
        self.apply, self.patience = apply, patience
        self._counts, self._seen = Counts(), Seen()
        self._shown: dict[str, float | str] = {}
        self._steps = 0
        self._last_step = 0.0
        self._hook: RemovableHandle | None = None
        self._model: nn.Module | None = None

    def attach(self, trainer: Trainer) -> PaddingFreeCallback:
        """Becomes the first callback of a Trainer. Returns itself."""
        put_first(trainer, self)
        return self

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        if self.apply and model is not None:  # with model_init there may be none yet
            patch_to_train(model)

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
        if self.apply:
            patch_to_train(model)
            verify_once(model)
        check_adapters(model)  # which may have come after apply
        check_all_begin(f"PaddingFreeCallback(patience={self.patience})")
        self._counts, self._seen, self._steps = Counts(), Seen(), 0
        self._shown = dict.fromkeys(FIGURES, "No log")
        self._last_step = self._counts.began  # of none yet: an evaluation may come first
        self._model = model
        if trainer := calling_trainer(self):
            put_first(trainer, self)
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
        if trainer := calling_trainer(self):
            show_in_notebooks(trainer, self._shown)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._steps += 1
        self._last_step = time.perf_counter()
        if self._steps == self.patience and self._hook is not None:
            self._check_packed(args)

    def _check_packed(self, args: TrainingArguments) -> None:
        """Raises PadfreeError if no row of any process held a second sequence so far."""
        (packed,) = of_all_processes([float(self._seen.packed)], args.device)
        if packed:
            return
        assert self._model is not None
        found = causes(self._seen, self._model, calling_trainer(self))
        self._unhook()
        raise PadfreeError(
            f"{self._steps} training steps, and no row held a second sequence: this run is not packed.\n  "
            + "\n  ".join(found or ["nothing unusual was seen; is the data_collator one that flattens?"])
            + "\nPaddingFreeCallback(patience=0) lets it run"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        # An evaluation's log and the summary at the end have no training loss, and a log of somebody's own no learning
        # rate. The Trainer's own is written on all processes, which sum their figures here.
        if logs is None or not {"loss", "learning_rate"} <= logs.keys() or self._hook is None:
            return
        figures = self._counts.figures(args.device)
        self._counts = Counts()
        if figures is None:
            return
        logs.update(figures)
        self._shown.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        now = time.perf_counter()
        self._counts.began += now - self._last_step  # which was no training
        self._last_step = now  # another data set may be evaluated next

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = self._model = None

    def _watch(
        self, model: nn.Module, args: tuple[object, ...], kwargs: Arguments
    ) -> tuple[tuple[object, ...], Arguments] | None:
        """Counts a training batch on its way into the model.

        Returns, if it is packed, the arguments with a copy of the positions, by which the model finds what was read.

        Raises PadfreeError if it is packed and the model is not patched.
        """
        tokens = tokens_of({**kwargs, "input_ids": args[0]} if args else kwargs)
        if not model.training or tokens is None or tokens.dim() < 2:
            return None
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
        mask = kwargs.get("attention_mask")
        self._seen.add(rows, length, real_tokens(rows, length, mask))
        if batch is None:
            self._counts.add_ordinary(rows, length, mask)
            return None
        if not is_applied(model):
            self._unhook()
            raise PadfreeError(
                f"{type(model).__name__} is given packed rows, but it is not patched; call padfree_patch.apply(model) "
                "before the training"
            )
        padding = ends_with_padding(batch, mask)
        self._counts.add_packed(batch, padding)
        self._seen.packed += len(batch.sequences) - padding > rows
        return None if kwargs.get("position_ids") is None else (args, {**kwargs, "position_ids": batch.position_ids})
