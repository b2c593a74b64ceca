"""A collator that trains on completions only, padded or flattened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..batch.labels import IGNORED_LABEL
from ..errors import PadfreeError
from .fields import Feature, Integers, as_tensors, lengths_inside, token_values
from .flattening import DataCollatorWithFlattening, FlatteningOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mask = npt.NDArray[np.bool_]


class Tokenizer(Protocol):
    """What is asked of a tokenizer; for padding, it has a `pad_token_id` too, and may have a `padding_side`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class DataCollatorForCompletionOnlyLM:
    """Trains on completions only: all tokens before a response template get the label `ignore_index`.

    TRL's collator of this name (removed there in 0.20), with its arguments and meaning. Two things differ: the labels
    are made before padding, so that a tokenizer whose pad is its end token still learns to end; and an example without
    its template is an error, where TRL warns and trains on nothing of the example.

    Args:
        response_template: the text or token ids after which a completion begins. The last one in an example counts, or
            with an `instruction_template` every one.
        instruction_template: the text or token ids with which the next instruction begins, for several turns: trained
            is from each response template to the next instruction.
        tokenizer: for templates given as text, and for padding; its `pad_token_id` is used.
        mlm: only False; TRL has it for its base class.
        ignore_index: label of what is not trained on.
        padding_free: flatten the examples (`DataCollatorWithFlattening`, which takes `flattening`) instead of padding.
        pad_to_multiple_of: round the padded length up to it, or the row's.
        flattening: arguments of `DataCollatorWithFlattening`.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        mlm: bool = False,
        *,
        ignore_index: int = IGNORED_LABEL,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        **flattening: Unpack[FlatteningOptions],
    ):
        if mlm:
            raise PadfreeError("DataCollatorForCompletionOnlyLM: mlm=True means nothing here, completions are causal")
        if flattening and not padding_free:
            raise PadfreeError(f"DataCollatorForCompletionOnlyLM: {', '.join(flattening)} need padding_free=True")
        self.tokenizer = tokenizer
        self.response_token_ids = self._template_ids(response_template, "response_template")
        self.instruction_token_ids = (
            None if instruction_template is None else self._template_ids(instruction_template, "instruction_template")
        )
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of
        options: FlatteningOptions = {"pad_token_id": getattr(tokenizer, "pad_token_id", None) or 0, **flattening}
        self._flatten = DataCollatorWithFlattening(
            separator_id=ignore_index, pad_to_multiple_of=pad_to_multiple_of, **options
        )

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Collates examples with `input_ids`; `labels` that they may have are not read.

        One that holds several examples itself (`seq_lengths`, or `position_ids` that restart) needs a template in each,
        and `padding_free`.

        Returns what `DataCollatorWithFlattening` does, or padded `input_ids`, `attention_mask` and `labels` (B, T).

        Raises PadfreeError naming the example if it has no response template (or none of the instruction template), or
        nothing after it.
        """
        examples = [self._with_labels(feature, i, len(features)) for i, feature in enumerate(features)]
        return self._flatten(examples) if self.padding_free else self._pad(examples)

    def _with_labels(self, feature: Feature, index: int, count: int) -> dict[str, object]:
        """Returns the example with labels that are `ignore_index` outside completions and in padding."""
        tokens = token_values(feature, "input_ids", index)
        lengths = lengths_inside(feature, len(tokens), index)
        if len(lengths) > 1 and not self.padding_free:
            raise PadfreeError(f"example {index} is a row of {len(lengths)} examples, which needs padding_free=True")
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        trained = np.concatenate([self._mark_completions(part, f"example {index} of {count}") for part in parts])
        mask = np.asarray(feature.get("attention_mask", np.ones_like(tokens)))
        labels = np.where(trained & (mask != 0), tokens, self.ignore_index)
        return {**feature, "input_ids": tokens, "labels": labels, "attention_mask": mask}

    def _mark_completions(self, tokens: Integers, place: str) -> Mask:
        """Returns bool (T,): whether a token belongs to a completion.

        Raises PadfreeError naming the `place` of the example if no token does.
        """
        trained = np.zeros(len(tokens), dtype=np.bool_)
        response = self.response_token_ids
        begins = [at + len(response) for at in _places_of(response, tokens, "response", place)]
        if self.instruction_token_ids is None:
            trained[begins[-1] :] = True
        else:
            instructions = _places_of(self.instruction_token_ids, tokens, "instruction", place)
            for begin in begins:
                trained[begin : next((at for at in instructions if at >= begin), len(tokens))] = True
            for begin in begins:  # a template is part of no completion, not even of the one before
                trained[begin - len(response) : begin] = False
        if not trained.any():
            raise PadfreeError(f"{place} has nothing after its response template; it may have been cut off")
        return trained

    def _template_ids(self, template: str | Sequence[int], name: str) -> list[int]:
        if isinstance(template, str):
            if self.tokenizer is None:
                raise PadfreeError(f"{name}={template!r} is text: pass tokenizer= too, or its token ids")
            template = self.tokenizer.encode(template, add_special_tokens=False)
        if not len(template):
            raise PadfreeError(f"{name} is empty")
        return [int(token) for token in template]

    def _pad(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pad_token_id = getattr(self.tokenizer, "pad_token_id", None)
        if pad_token_id is None:
            raise PadfreeError("padding needs a tokenizer with a pad_token_id; or choose padding_free=True")
        fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": self.ignore_index}
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(example["input_ids"]) for example in examples) // multiple) * multiple
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        batch = {name: np.full((len(examples), width), value, dtype=np.int64) for name, value in fill.items()}
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            for name, values in batch.items():
                values[row, width - size if left else 0 : width if left else size] = example[name]
        return as_tensors(batch, "pt")


def _places_of(template: list[int], tokens: Integers, what: str, place: str) -> list[int]:
    """Returns the positions at which a template begins.

    Raises PadfreeError naming the `place` of the example if there is none.
    """
    size = len(template)
    positions = [at for at in range(len(tokens) - size + 1) if tokens[at : at + size].tolist() == template]
    if not positions:
        raise PadfreeError(
            f"{place} has no {what} template ({template}) in its {len(tokens)} tokens; "
            "it may have been cut off, or the tokenizer splits the text differently in its context (give token ids)"
        )
    return positions
