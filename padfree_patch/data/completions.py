"""A collator that trains on completions only, padded or flattened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch

from ..arguments import Integers, number_of_64_bits, whole_numbers
from ..batch.labels import IGNORED_LABEL
from ..errors import PadfreeError
from .fields import (
    READ,
    Batch,
    Feature,
    LeftOut,
    Mask,
    as_tensors,
    label_masks,
    list_of_examples,
    mask_values,
    token_values,
    trained_tokens,
)
from .flattening import DataCollatorWithFlattening, FlatteningOptions
from .lengths_inside import lengths_inside

if TYPE_CHECKING:
    from typing_extensions import Unpack

Template: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
TokenIds: TypeAlias = list[int] | list[list[int]]
Example: TypeAlias = Feature | Sequence[int] | torch.Tensor


class Tokenizer(Protocol):
    """What is asked of a tokenizer; for padding, it has a `pad_token_id` too, and may have a `padding_side`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class DataCollatorForCompletionOnlyLM:
    """Trains on completions only: all tokens before a response template get the label `ignore_index`.

    TRL's collator of this name (removed there in 0.20), with its arguments and meaning. Two things differ: the labels
    are made before padding, so that a tokenizer whose pad is its end token still learns to end; and an example without
    its template is an error, where TRL warns and trains on nothing of the example.

    A subclass can extend `torch_call`, as one of TRL's can.

    Args:
        response_template: the text or token ids after which a completion begins. The last one in an example counts, or
            with an `instruction_template` every one. A list of texts, or of lists of ids, means any of them.
        instruction_template: the text or token ids with which the next instruction begins, for several turns: trained
            is from each response template to the next instruction. A list means any of them too.
        tokenizer: for templates given as text, and for padding; its `pad_token_id` is used.
        mlm: only False; TRL has it for its base class.
        ignore_index: label of what is not trained on.
        padding_free: flatten the examples (`DataCollatorWithFlattening`, which takes `flattening`) instead of padding.
            The batch then also holds `packed_sequences`, and TRL's `cu_seq_lens_q` and `cu_seq_lens_k`, int32
            (1, sequences + 1), and `max_length_q` and `max_length_k`, int64 (1,), unless `return_flash_attn_kwargs`
            says whether the batch holds all of them, in transformers' form.
        pad_to_multiple_of: round the padded length up to it, or the row's.
        flattening: arguments of `DataCollatorWithFlattening`; without `padding_free` only `return_tensors`.
    """

    def __init__(
        self,
        response_template: Template,
        instruction_template: Template | None = None,
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
        if not padding_free and (needing := sorted(set(flattening) - {"return_tensors"})):
            raise PadfreeError(f"DataCollatorForCompletionOnlyLM: {', '.join(needing)} need padding_free=True")
        self.tokenizer = tokenizer
        self.response_template, self.instruction_template = response_template, instruction_template
        self.response_token_ids = self._template_ids(response_template, "response_template")
        self.instruction_token_ids = (
            None if instruction_template is None else self._template_ids(instruction_template, "instruction_template")
        )
        self.ignore_index = number_of_64_bits(ignore_index, "ignore_index")
        self.padding_free = padding_free
        self.return_tensors = flattening.get("return_tensors", "pt")
        self._trl_lengths = padding_free and "return_flash_attn_kwargs" not in flattening
        options: FlatteningOptions = {
            "pad_token_id": getattr(tokenizer, "pad_token_id", None) or 0,
            "return_flash_attn_kwargs": self._trl_lengths,
            **flattening,
        }
        self._flatten = DataCollatorWithFlattening(
            separator_id=ignore_index, pad_to_multiple_of=pad_to_multiple_of, **options
        )
        self.pad_to_multiple_of = self._flatten.pad_to_multiple_of
        self._left_out = LeftOut("choose padding_free=True with token_fields= or example_fields=, or remove the column")

    def __call__(self, features: Iterable[Example], return_tensors: str | None = None) -> Batch:
        """Collates examples with `input_ids`; `labels` that they may have are not read, TRL's label masks are.

        One that holds several examples itself (`seq_lengths`, or `position_ids` that restart) needs a template in each,
        and `padding_free`.

        Args:
            features: the examples; one may also be its token ids alone.
            return_tensors: instead of what was given to the constructor.

        Returns what `DataCollatorWithFlattening` does, or padded `input_ids`, `attention_mask` and `labels` (B, T).

        Raises PadfreeError naming the example if it has no response template (or none of the instruction template), or
        nothing after it.
        """
        kind = return_tensors or self.return_tensors
        return self.torch_call(features) if kind == "pt" else self._collate(features, kind)

    def torch_call(self, examples: Iterable[Example]) -> Batch:
        """Collates examples into tensors; `__call__` comes here."""
        return self._collate(examples, "pt")

    def _collate(self, features: Iterable[Example], kind: str) -> Batch:
        examples = list_of_examples(features, token_lists=True)
        if not examples:
            raise PadfreeError("no examples to collate")
        masks = label_masks(examples)
        labelled = [self._with_labels(feature, masks, i, len(examples)) for i, feature in enumerate(examples)]
        if not self.padding_free:
            self._left_out.warn_of(examples, READ)
            return self._pad(labelled, kind)
        batch = self._flatten(labelled, return_tensors=kind)
        return _in_trls_form(batch, kind) if self._trl_lengths and "cu_seq_lens_q" in batch else batch

    def _with_labels(self, feature: Feature, masks: Sequence[str], index: int, count: int) -> dict[str, object]:
        """Returns the example with labels that are `ignore_index` outside completions, in padding and by the masks."""
        tokens = token_values(feature, "input_ids", index)
        keeps = self.padding_free and "position_ids" in self._flatten.token_fields
        lengths = lengths_inside(feature, len(tokens), index, keeps_positions=keeps)
        if len(lengths) > 1 and not self.padding_free:
            raise PadfreeError(f"example {index} is a row of {len(lengths)} examples, which needs padding_free=True")
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        trained = np.concatenate([self._mark_completions(part, f"example {index} of {count}") for part in parts])
        mask = mask_values(feature, "attention_mask", len(tokens), f"example {index}")
        trained &= (mask != 0) & trained_tokens(feature, masks, len(tokens), index)
        labels = np.where(trained, tokens, self.ignore_index)
        others = {name: value for name, value in feature.items() if name not in masks}
        return {**others, "input_ids": tokens, "labels": labels, "attention_mask": mask}

    def _mark_completions(self, tokens: Integers, place: str) -> Mask:
        """Returns bool (T,): whether a token belongs to a completion.

        Raises PadfreeError naming the `place` of the example if no token does.
        """
        trained = np.zeros(len(tokens), dtype=np.bool_)
        responses = _places_of(self.response_token_ids, tokens, "response", place)
        if self.instruction_token_ids is None:
            trained[responses[-1][1] :] = True
        else:
            instructions = [begin for begin, _ in _places_of(self.instruction_token_ids, tokens, "instruction", place)]
            for _, end in responses:
                trained[end : next((at for at in instructions if at >= end), len(tokens))] = True
            for begin, end in responses:  # a template is part of no completion, not even of the one before
                trained[begin:end] = False
        if not trained.any():
            raise PadfreeError(f"{place} has nothing after its response template; it may have been cut off")
        return trained

    def _template_ids(self, given: Template, name: str) -> TokenIds:
        """Returns the token ids of a template, or of each in a list of several.

        Raises PadfreeError naming the argument if one is empty, is no text and no token ids, or is text without a
        tokenizer.
        """
        if not isinstance(given, str | Sequence | np.ndarray | torch.Tensor) or getattr(given, "ndim", 1) == 0:
            raise PadfreeError(f"{name} must be text, token ids or a list of either, found {type(given).__name__}")
        if not isinstance(given, str) and len(given) and isinstance(given[0], str | Sequence | np.ndarray):
            return [self._ids_of_one(each, name) for each in given]
        return self._ids_of_one(given, name)

    def _ids_of_one(self, template: Any, name: str) -> list[int]:
        if isinstance(template, str):
            if self.tokenizer is None:
                raise PadfreeError(f"{name}={template!r} is text: pass tokenizer= too, or its token ids")
            template = self.tokenizer.encode(template, add_special_tokens=False)
        ids: list[int] = whole_numbers(template, name).tolist()
        if not ids:
            raise PadfreeError(f"{name} is empty")
        return ids

    def _pad(self, examples: Sequence[Mapping[str, Any]], kind: str) -> Batch:
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
        return as_tensors(batch, kind)


def _in_trls_form(batch: Batch, kind: str) -> Batch:
    """Returns a flattened batch with its lengths as TRL's collator has them: each with a batch dimension of 1."""
    longest = as_tensors({"longest": np.array([batch["max_length_q"]], dtype=np.int64)}, kind)["longest"]
    in_rows = {name: batch[name][None] for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    return {**batch, **in_rows, "max_length_q": longest, "max_length_k": longest}


def _places_of(ids: TokenIds, tokens: Integers, what: str, place: str) -> list[tuple[int, int]]:
    """Returns where a template, or one of several, begins and ends, in order.

    Raises PadfreeError naming the `place` of the example if there is none.
    """
    templates = [each if isinstance(each, list) else [each] for each in ids] if isinstance(ids[0], list) else [ids]
    places = sorted(
        (at, at + len(template))
        for template in templates
        for at in range(len(tokens) - len(template) + 1)
        if tokens[at : at + len(template)].tolist() == template
    )
    if not places:
        raise PadfreeError(
            f"{place} has no {what} template ({', '.join(map(str, templates))}) in its {len(tokens)} tokens; "
            "it may have been cut off, or the tokenizer splits the text differently in its context (give token ids)"
        )
    return places
