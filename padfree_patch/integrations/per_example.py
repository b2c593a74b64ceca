"""Evaluation on packed rows: `compute_metrics` gets a row for each example, as of a padded batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch.labels import IGNORED_LABEL
from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import read_batch
from ..batch.sequences import PackedSequences
from ..data.unpacking import unpack
from ..errors import PadfreeError
from ..upstream import Arguments
from .figures import of_all_processes

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class PerExampleMetrics(Base):
    """Gives a Trainer's `compute_metrics` a row for each example of a packed row. Stands before the Trainer's class.

        class MyTrainer(padfree_patch.PerExampleMetrics, Trainer): ...

    `compute_metrics` and `preprocess_logits_for_metrics` then get logits (examples, longest, vocabulary) and labels
    (examples, longest), filled up with zeros and with -100 at the end of each, as a padded batch would give them.
    Without it they get a row (1, tokens) for each batch. Padded batches, and models with one result for each example,
    are left as they are.

    On several processes the examples must come one by one: of rows of `pack_dataset`, which hold several each,
    accelerate can't tell how many are left at the end. That is a PadfreeError; evaluate such rows on one process.
    """

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Arguments,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, object, object]:
        """Runs the Trainer's own step; returns its loss, and logits and labels of each example."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        sequences = _sequences_of(inputs)
        if sequences is None or logits is None:
            return loss, logits, labels
        self._count_what_is_left(len(sequences) - bool(sequences.padding))
        return loss, _of_each(logits, sequences, 0), _of_each(labels, sequences, IGNORED_LABEL)

    def _count_what_is_left(self, examples: int) -> None:
        """Keeps accelerate from cutting the last batch to what it takes for the number of its examples."""
        if self.args.world_size == 1:
            self.gather_function = _as_it_is
            return
        most = of_all_processes([float(examples), float(-examples)], self.args.device, largest=True)
        if most[0] != -most[1] or examples > self.args.per_device_eval_batch_size:
            raise PadfreeError(
                f"PerExampleMetrics: a batch of {examples} examples for per_device_eval_batch_size="
                f"{self.args.per_device_eval_batch_size} on {self.args.world_size} processes, on one of them up to "
                f"{most[0]:g}; evaluate examples one by one, not rows of pack_dataset, or on one process"
            )


def _as_it_is(values: object) -> object:
    return values


def _sequences_of(inputs: Arguments) -> PackedSequences | None:
    """Returns the sequences of a packed batch; None if it is ordinary."""
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return None
    lengths = {name: inputs[name] for name in LENGTH_ARGUMENTS if inputs.get(name) is not None}
    batch = read_batch(
        (int(tokens.shape[0]), int(tokens.shape[1])),
        tokens.device,
        position_ids=inputs.get("position_ids"),
        attention_mask=inputs.get("attention_mask"),
        lengths=lengths,
    )
    return None if batch is None else batch.sequences


def _of_each(values: object, sequences: PackedSequences, fill: int) -> object:
    """Returns what has a value for each token with a row for each example; anything else as it is."""
    if isinstance(values, tuple):
        return tuple(_of_each(each, sequences, fill) for each in values)
    if not isinstance(values, Tensor) or values.dim() < 2 or values.shape[:2].numel() != sequences.total:
        return values
    examples = unpack(values, sequences)
    return pad_sequence(examples[:-1] if sequences.padding else examples, batch_first=True, padding_value=fill)
