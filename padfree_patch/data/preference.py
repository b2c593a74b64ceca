"""A collator that flattens pairs of a preferred and a rejected answer: for DPO, its kin and reward models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import Integers, names, number_of_64_bits
from ..batch.labels import IGNORED_LABEL
from ..errors import PadfreeError
from .fields import (
    Batch,
    Feature,
    LeftOut,
    as_tensors,
    field_names,
    list_of_examples,
    mask_values,
    stack_field,
    token_values,
)
from .flattening import DataCollatorWithFlattening, RowOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BREAKING = {"max_tokens", "pad_to_multiple_of", "token_fields", "example_fields", "separator_id"}
"""Arguments of `DataCollatorWithFlattening` that would leave examples out, add a sequence, or change the labels."""

_ANSWERS = ("chosen", "rejected")

_READ = {f"{part}{end}" for part in ("prompt", *_ANSWERS) for end in ("", "_ids", "_input_ids", "_labels")} | {
    f"{part}_attention_mask" for part in ("prompt", *_ANSWERS)
}
"""TRL's columns: tokens, labels, masks, and the texts that they were made from."""

_COLUMNS_OF_ROWS = {
    "completion_mask",
    *(f"{part}_input_ids" for part in ("prompt", *_ANSWERS)),
    *(f"input_ids_{part}" for part in _ANSWERS),
}
"""What TRL's DPOTrainer and RewardTrainer read of a batch, from 0.9 to 1.16."""


class PairsInOneRow(Batch):
    """A batch of pairs. Asked for a row per answer, as TRL's DPOTrainer asks, it says what to do instead."""

    def __missing__(self, name: str) -> object:
        if name in _COLUMNS_OF_ROWS:
            raise PadfreeError(
                f"something asks a batch of padfree_patch's DataCollatorForPreference for {name}, a row per answer, "
                "but all answers are in one row. TRL's trainers, DPOTrainer and RewardTrainer among them, need TRL's "
                "own collator: leave data_collator out, and let the patched model compute TRL's padded batches without "
                "their padding: padfree_patch.integrations.padded.pack_padded(model) (docs/training.md, Preferences)"
            )
        raise KeyError(name)


class DataCollatorForPreference:
    """Flattens pairs into one row (1, T): every chosen answer, then every rejected one, each after its prompt.

    TRL's collator of this name, with its columns and order, without padding. The labels are those of the answers:
    `sequence_log_probs(logits, labels, packed_sequences)` gives (2 * pairs,), the first half of which are the chosen
    ones, and so does `last_tokens` for a reward model. docs/training.md has the loss for a plain Trainer. TRL's own
    trainers compute their losses from a row per answer and cannot take it: leave them their collator, and let the model
    pack inside (`padfree_patch.integrations.padded.pack_padded`).

    Args:
        ignore_index: label of prompts.
        share_prompts: compute each prompt once for both of its answers, and for all pairs of the batch that have it:
            the row is for a patched model only (`DataCollatorWithFlattening(share_prefixes=True)`). `unpack`,
            `sequence_log_probs` and `last_tokens` give an item for each answer, in the same order.
        pair_fields: names of more fields with a value per pair, such as a reference model's log-probabilities
            (`ref_chosen_logps`), which are stacked: (pairs, ...).
        flattening: arguments of `DataCollatorWithFlattening`, except those that leave examples out or add a sequence.
            `return_flash_attn_kwargs` is on unless it is given: the batch holds its `packed_sequences`.
    """

    def __init__(
        self,
        *,
        ignore_index: int = IGNORED_LABEL,
        share_prompts: bool = False,
        pair_fields: Sequence[str] = (),
        **flattening: Unpack[RowOptions],
    ):
        if breaking := _BREAKING & set(flattening):
            raise PadfreeError(
                f"DataCollatorForPreference takes no {', '.join(sorted(breaking))}: the first half of a row's "
                "sequences must be the chosen ones of the second. Fields of a pair are pair_fields, labels of prompts "
                "ignore_index"
            )
        self.ignore_index = number_of_64_bits(ignore_index, "ignore_index")
        if share_prompts and self.ignore_index >= 0:
            raise PadfreeError(
                f"share_prompts=True can't tell prompts by ignore_index={self.ignore_index}, which could be a token; "
                "choose a negative one"
            )
        self.share_prompts = share_prompts
        self.pair_fields = names(pair_fields, "pair_fields")
        self._left_out = LeftOut(
            "name fields with a value per pair in pair_fields=, or remove the column from the data set"
        )
        options: RowOptions = {"return_flash_attn_kwargs": True, **flattening}
        self._flatten = DataCollatorWithFlattening(separator_id=ignore_index, share_prefixes=share_prompts, **options)

    def __call__(self, features: Iterable[Feature]) -> Batch:
        """Collates pairs.

        Args:
            features: each with `chosen_ids` and `rejected_ids` and, if the two do not hold it themselves, the
                `prompt_ids` that both continue, lists or 1-D tensors; before TRL 1.0 the names end in `_input_ids`.
                With `chosen_labels` and `rejected_labels` (TRL before 0.12) the answers hold their prompt. A warning
                names fields that are left out.

        Returns what `DataCollatorWithFlattening` does, and the `pair_fields`.

        Raises PadfreeError naming the pair if it lacks an answer or has an empty or padded one, has the labels of one
        answer only, or has a prompt where the first pair has none.
        """
        features = list_of_examples(features)
        if not features:
            raise PadfreeError("no pairs to collate")
        self._left_out.warn_of(features, {*_READ, *self.pair_fields})
        has_prompt = _token_column(features[0], "prompt") is not None
        examples = [
            self._example(feature, answer, has_prompt, i, len(features))
            for answer in _ANSWERS
            for i, feature in enumerate(features)
        ]
        batch = self._flatten(examples)
        fields = {name: stack_field(features, name) for name in self.pair_fields}
        return PairsInOneRow({**batch, **as_tensors(fields, self._flatten.return_tensors)})

    def _example(self, feature: Feature, answer: str, has_prompt: bool, index: int, count: int) -> dict[str, Integers]:
        """Returns one answer of a pair after its prompt, whose labels are `ignore_index`."""
        place = f"pair {index} of {count}"
        if has_prompt != (_token_column(feature, "prompt") is not None):
            raise PadfreeError(f"{place}: a prompt in some pairs only; found {field_names(feature)}")
        tokens = _pair_tokens(feature, answer, index)
        if not len(tokens):
            raise PadfreeError(f"{place} has an empty {answer} answer")
        with_labels = [name for name in _ANSWERS if feature.get(f"{name}_labels") is not None]
        if len(with_labels) == 1:
            raise PadfreeError(f"{place} has {with_labels[0]}_labels only; give those of both answers, or of neither")
        if self.share_prompts and not (has_prompt or with_labels):
            raise PadfreeError(
                f"{place} has no prompt_ids, and no labels that say where its answers begin, so there is no prompt to "
                "share; give prompt_ids, or collate without share_prompts"
            )
        if with_labels:  # whole texts, as TRL before 0.12 makes them
            return {"input_ids": tokens, "labels": token_values(feature, f"{answer}_labels", index)}
        prompt = _pair_tokens(feature, "prompt", index) if has_prompt else np.zeros(0, dtype=np.int64)
        labels = np.concatenate([np.full_like(prompt, self.ignore_index), tokens])
        return {"input_ids": np.concatenate([prompt, tokens]), "labels": labels}


def _token_column(feature: Feature, name: str) -> str | None:
    """Returns the column that holds the prompt or an answer, by the newer or the older of TRL's names."""
    return next((each for each in (f"{name}_ids", f"{name}_input_ids") if feature.get(each) is not None), None)


def _pair_tokens(feature: Feature, name: str, index: int) -> Integers:
    column = _token_column(feature, name)
    if column is None:
        raise PadfreeError(f"pair {index} has no {name}_ids; it has {field_names(feature)}")
    tokens = token_values(feature, column, index)
    mask = mask_values(feature, f"{name}_attention_mask", len(tokens), f"pair {index}")
    if padding := int((mask == 0).sum()):
        raise PadfreeError(f"pair {index}: {name} is padded by {padding} tokens; tokenise with padding=False")
    return tokens
