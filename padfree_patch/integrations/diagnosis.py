"""Why a run that should be packed is not: what its batches, its data set and its model show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..data.boundary_columns import COLUMNS_OF_PACKED_ROWS
from ..models import pretrained_modules
from ..wrapping.opt_in import is_class_forward

if TYPE_CHECKING:
    from transformers import Trainer

COLLATOR = "padfree_patch.DataCollatorWithFlattening"


@dataclasses.dataclass
class Seen:
    """What the training batches looked like so far."""

    batches: int = 0
    tokens: int = 0
    """Padding included."""
    real_tokens: int | Tensor = 0
    rows: set[int] = dataclasses.field(default_factory=set)
    """Numbers of rows of a batch; two are enough to know that they differ."""
    lengths: set[int] = dataclasses.field(default_factory=set)
    """Likewise, of tokens of a row."""
    packed: int | Tensor = 0
    """Batches of which a row held a second example."""

    def add(self, rows: int, length: int, real_tokens: int | Tensor) -> None:
        self.batches += 1
        self.tokens += rows * length
        self.real_tokens += real_tokens
        for values, value in ((self.rows, rows), (self.lengths, length)):
            if len(values) < 2:
                values.add(value)


def causes(seen: Seen, model: nn.Module, trainer: Trainer | None) -> list[str]:
    """Returns what the callback sees that keeps a run from being packed, with what to do; most certain first."""
    return [*_no_batches(seen, model), *_lost_columns(trainer), *_replaced_forwards(model), *_batches(seen, trainer)]


def _removed_columns(trainer: Trainer | None) -> list[str]:
    """Returns the columns of the data set that say where examples end, if the Trainer has removed them all."""
    given = getattr(getattr(trainer, "train_dataset", None), "column_names", None)
    if trainer is None or not isinstance(given, list) or not trainer.args.remove_unused_columns:
        return []
    loader = trainer.callback_handler.train_dataloader
    left = getattr(getattr(loader, "dataset", None), "column_names", None)
    say_it = set(COLUMNS_OF_PACKED_ROWS) - {"attention_mask"}  # if that one does, the rows are packed
    return [name for name in given if name in say_it] if isinstance(left, list) and not say_it & set(left) else []


def _no_batches(seen: Seen, model: nn.Module) -> Iterator[str]:
    if not seen.batches:
        yield (
            f"no training batch came to {type(model).__name__} by a call of it: the Trainer's compute_loss calls "
            "something else, or its forward directly"
        )


def _lost_columns(trainer: Trainer | None) -> Iterator[str]:
    if columns := _removed_columns(trainer):
        yield (
            f"the Trainer removed {', '.join(columns)}, which say where the examples of a row end, from the data set, "
            "because the model's forward does not name them: pass remove_unused_columns=False"
        )


def _replaced_forwards(model: nn.Module) -> Iterator[str]:
    for module in pretrained_modules(model):
        own = vars(module).get("forward")
        if own is None or is_class_forward(module, own):
            continue
        if hasattr(own, "__wrapped__") or "_old_forward" in vars(module):  # accelerate's, around that of the class
            continue
        name = f"{getattr(own, '__module__', '')}.{getattr(own, '__qualname__', type(own).__name__)}"
        yield (
            f"{type(module).__name__}.forward was replaced on the instance by {name}, which may not pass on where "
            "examples end: replace it before padfree_patch.apply(model)"
        )


def _batches(seen: Seen, trainer: Trainer | None) -> Iterator[str]:
    collator = "the data_collator" if trainer is None else _name(trainer.data_collator)
    batch_size = None if trainer is None else trainer.args.per_device_train_batch_size
    if int(seen.real_tokens) < seen.tokens:
        yield f"the batches are padded: use a data_collator that flattens ({COLLATOR}) instead of {collator}"
        return
    if seen.rows == {1} and batch_size == 1:
        yield (
            "the batch size is 1, and each row holds one example or does not say that it holds more: raise "
            "per_device_train_batch_size, or pack the data set (padfree_patch.pack_dataset)"
        )
    if seen.batches and (seen.rows != {1} or len(seen.lengths) == 1):
        yield (
            "the rows are full, and nothing says where examples end (no positions that restart, no lengths, no segment "
            "numbers), as in the rows of TRL's packing_strategy='wrapped': docs/training.md names the packings that "
            "carry boundaries"
        )
    elif seen.rows == {1} and batch_size != 1:
        yield (
            f"{batch_size or 'several'} examples come as one row that does not say where they end: {collator} returns "
            "no position_ids that restart, or something between it and the model drops them"
        )


def _name(collator: object) -> str:
    return getattr(collator, "__qualname__", type(collator).__qualname__)
