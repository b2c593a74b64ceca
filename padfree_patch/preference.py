"""Pairs of a preferred and a rejected answer in one row: what DPO, its kin and reward models train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .collators import DataCollatorWithFlattening, as_tensors, stacked_fields, token_values
from .errors import PadfreeError

_BREAKING = {"max_tokens", "pad_to_multiple_of", "token_fields", "example_fields", "separator_id"}


class DataCollatorForPreference:
    """Flattens pairs into one row (1, T): every chosen answer, then every rejected one, each after its prompt.

    TRL's collator of this name, with its columns and order, without padding. The labels are those of the answers:
    `sequence_log_probs(logits, labels, packed_sequences)` gives (2 * pairs,), the first half of which are the chosen
    ones, and so does `last_tokens` for a reward model.

    Args:
        ignore_index: label of prompts.
        pair_fields: names of more fields with a value per pair, such as a reference model's log-probabilities
            (`ref_chosen_logps`), which are stacked: (pairs, ...).
        flattening: arguments of `DataCollatorWithFlattening`, but for those that leave examples out or add a sequence.
            `return_flash_attn_kwargs` is on unless it is given: the batch holds its `packed_sequences`.
    """

    def __init__(self, *, ignore_index: int = -100, pair_fields: Sequence[str] = (), **flattening: Any):
        if breaking := _BREAKING & set(flattening):
            raise PadfreeError(
                f"DataCollatorForPreference takes no {', '.join(sorted(breaking))}: the first half of a row's "
                "sequences must be the chosen ones of the second. Fields of a pair are pair_fields, labels of prompts "
                "ignore_index"
            )
        self.ignore_index = ignore_index
        self.pair_fields = pair_fields
        self._flatten = DataCollatorWithFlattening(
            separator_id=ignore_index, **{"return_flash_attn_kwargs": True, **flattening}
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates pairs.

        Args:
            features: each with `chosen_ids` and `rejected_ids` and, if the two do not hold it themselves, the
                `prompt_ids` that both continue, lists or 1-D tensors; before TRL 1.0 the names end in `_input_ids`.
                With `chosen_labels` and `rejected_labels` (TRL before 0.12) the answers hold their prompt.

        Returns what `DataCollatorWithFlattening` does, and the `pair_fields`.

        Raises PadfreeError naming the pair if it lacks an answer or has an empty one, or has a prompt where the first
        pair has none.
        """
        if not features:
            raise PadfreeError("no pairs to collate")
        has_prompt = _column(features[0], "prompt") is not None
        examples = []
        for answer in ("chosen", "rejected"):
            for i, feature in enumerate(features):
                if has_prompt != (_column(feature, "prompt") is not None):
                    raise PadfreeError(
                        f"pair {i} of {len(features)}: a prompt in some pairs only; found {_of(feature)}"
                    )
                tokens = _tokens(feature, answer, i)
                if not len(tokens):
                    raise PadfreeError(f"pair {i} of {len(features)} has an empty {answer} answer")
                if feature.get(f"{answer}_labels") is not None:  # whole texts, as TRL before 0.12 makes them
                    labels = token_values(feature, f"{answer}_labels", i)
                    examples.append({"input_ids": tokens, "labels": labels})
                    continue
                prompt = _tokens(feature, "prompt", i) if has_prompt else np.zeros(0, dtype=np.int64)
                labels = np.concatenate([np.full_like(prompt, self.ignore_index), tokens])
                examples.append({"input_ids": np.concatenate([prompt, tokens]), "labels": labels})
        batch = self._flatten(examples)
        fields = {name: stacked_fields(features, name) for name in self.pair_fields}
        return {**batch, **as_tensors(fields, self._flatten.return_tensors)}


def _column(feature: Mapping[str, Any], name: str) -> str | None:
    """What the feature calls these tokens."""
    return next((each for each in (f"{name}_ids", f"{name}_input_ids") if feature.get(each) is not None), None)


def _tokens(feature: Mapping[str, Any], name: str, index: int) -> np.ndarray[Any, Any]:
    column = _column(feature, name)
    if column is None:
        raise PadfreeError(f"pair {index} has no {name}_ids; it has {_of(feature)}")
    return token_values(feature, column, index)


def _of(feature: Mapping[str, Any]) -> str:
    return ", ".join(feature) or "nothing"
