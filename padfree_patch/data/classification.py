"""A collator for examples with one label each: classifiers and reward models that score single texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import PadfreeError
from .fields import Batch, Feature, field_names, list_of_examples
from .flattening import DataCollatorWithFlattening, FlatteningOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

LABELS = ("label", "labels", "label_ids")
"""What data sets call the label of an example; the Trainer keeps all three."""


class DataCollatorForSequenceClassification:
    """Flattens examples with one label each into one row (1, T), with `labels` (examples, ...).

    A patched model of a class `...ForSequenceClassification` gives logits (examples, num_labels) for such a row, and
    the loss of the labels, so the Trainer and its `compute_metrics` work as with a padded batch.

    Args:
        flattening: arguments of `DataCollatorWithFlattening`. `return_flash_attn_kwargs` is on unless it is given: the
            batch holds its `packed_sequences`.
    """

    def __init__(self, **flattening: Unpack[FlatteningOptions]):
        options: FlatteningOptions = {"return_flash_attn_kwargs": True, **flattening}
        options["example_fields"] = [*options.get("example_fields", ()), LABELS[0]]
        self._flatten = DataCollatorWithFlattening(**options)

    def __call__(self, features: Iterable[Feature]) -> Batch:
        """Collates examples.

        Args:
            features: each with `input_ids` and a `label` (or `labels`, `label_ids`): a class, a number, or a list of
                numbers for several labels.

        Returns what `DataCollatorWithFlattening` does, with the labels of the examples as `labels`.

        Raises PadfreeError naming the example if it has no label, or a label for each token.
        """
        examples = list_of_examples(features)
        batch = self._flatten([_with_its_label(each, index) for index, each in enumerate(examples)])
        batch["labels"] = batch.pop(LABELS[0])  # in the place of those of tokens
        return batch


def _with_its_label(feature: Feature, index: int) -> Feature:
    """Returns an example whose label has the first of the names, and which has no other labels."""
    names = [name for name in LABELS if feature.get(name) is not None]
    if len(names) != 1:
        raise PadfreeError(
            f"example {index} must have one label, as {', '.join(LABELS[:-1])} or {LABELS[-1]}; "
            f"it has {field_names(feature)}"
        )
    return {**{name: value for name, value in feature.items() if name not in LABELS}, LABELS[0]: feature[names[0]]}
