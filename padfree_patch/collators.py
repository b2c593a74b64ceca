"""Collators that flatten examples into one row instead of padding them, and say where each ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import PadfreeError
from .packing import PackedSequences


class DataCollatorWithFlattening:
    """Flattens a batch of examples into one row (1, T) without padding; upstream's newest, on every version.

    Arguments, defaults and results are those of `transformers.DataCollatorWithFlattening` 5.23, with these differences:
    an example without tokens, with padding, or with labels of another length is an error; and beside the
    FlashAttentionKwargs stands `packed_sequences`, the lengths as Python integers, from which a patched model works
    without reading anything back from the device.

    The label of each example's first token becomes `separator_id`, so that no example is trained to predict the
    beginning of the next one. How many sequences flash-attn's varlen backward can take at once,
    (tokens + 128 * sequences) * heads * head_dim rounded up to 32 < 2**31, depends on the model: the flash_attn backend
    checks it when the batch arrives there.

    Args:
        return_tensors: "pt" or "np".
        return_position_ids: return `position_ids`, which restart at `position_ids_start` for every example.
        separator_id: label of each example's first token.
        return_flash_attn_kwargs: return `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, and
            `packed_sequences`. An unpatched model refuses or ignores them.
        return_seq_idx: return `seq_idx`, the number of the example that a token belongs to, int32 (1, T).
        position_ids_start: position of each example's first token.
    """

    def __init__(
        self,
        return_tensors: str = "pt",
        *,
        return_position_ids: bool = True,
        separator_id: int = -100,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        position_ids_start: int = 0,
    ):
        self.return_tensors = return_tensors
        self.return_position_ids = return_position_ids
        self.separator_id = separator_id
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx
        self.position_ids_start = position_ids_start

    def __call__(
        self,
        features: Sequence[Mapping[str, Any]],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> dict[str, Any]:
        """Flattens examples.

        Args:
            features: each with `input_ids` and, if one has them, `labels`, lists or 1-D tensors of one length.
            return_tensors, separator_id: instead of those given to the constructor.

        Returns int64 `input_ids` and `labels` (1, T), and what the constructor was asked for.

        Raises PadfreeError naming the example if one is empty, padded, or has labels of another length.
        """
        separator = self.separator_id if separator_id is None else separator_id
        if not features:
            raise PadfreeError("no examples to collate")
        tokens = [_values(feature, "input_ids", i) for i, feature in enumerate(features)]
        has_labels = any("labels" in feature for feature in features)
        labels = [_values(feature, "labels", i) for i, feature in enumerate(features)] if has_labels else tokens
        for i, feature in enumerate(features):
            _check_example(i, len(features), tokens[i], labels[i], feature.get("attention_mask"))
        sequences = PackedSequences.from_lengths(map(len, tokens))
        positions = sequences.position_ids().numpy()
        batch: dict[str, Any] = {
            "input_ids": np.concatenate(tokens)[None],
            "labels": np.where(positions == 0, separator, np.concatenate(labels))[None],
        }
        if self.return_position_ids:
            batch["position_ids"] = (positions + self.position_ids_start)[None]
        if self.return_seq_idx:
            batch["seq_idx"] = np.repeat(np.arange(len(tokens), dtype=np.int32), sequences.lengths)[None]
        if self.return_flash_attn_kwargs:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = sequences.cu_seqlens.numpy()
            batch["max_length_q"] = batch["max_length_k"] = sequences.max_seqlen
        batch = _as_tensors(batch, return_tensors or self.return_tensors)
        if self.return_flash_attn_kwargs:
            batch["packed_sequences"] = sequences
        return batch


class DataCollatorForCompletionOnlyLM:
    """Trains on completions only: what comes before a response template gets the label `ignore_index`.

    TRL's collator of this name (removed there in 0.20), with its arguments and meaning. Two things differ: the labels
    are made before padding, so that a tokenizer whose pad is its end token still learns to end; and an example without
    its template is an error instead of a warning and an example that trains nothing.

    Args:
        response_template: what a completion begins after, as text or token ids. The last one counts, or with an
            `instruction_template` every one.
        instruction_template: what the next instruction begins with, for several turns: trained is from each response
            template to the next instruction.
        tokenizer: for templates given as text, and for padding; its `pad_token_id` is used.
        mlm: only False; TRL has it for its base class.
        ignore_index: label of what is not trained on.
        padding_free: flatten the examples (`DataCollatorWithFlattening`, which takes `flattening`) instead of padding.
        pad_to_multiple_of: round the padded length up to it.
        flattening: arguments of `DataCollatorWithFlattening`.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        tokenizer: Any = None,
        mlm: bool = False,
        *,
        ignore_index: int = -100,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        **flattening: Any,
    ):
        if mlm:
            raise PadfreeError("DataCollatorForCompletionOnlyLM: mlm=True means nothing here, completions are causal")
        if flattening and not padding_free:
            raise PadfreeError(f"DataCollatorForCompletionOnlyLM: {', '.join(flattening)} need padding_free=True")
        self.tokenizer = tokenizer
        self.response_token_ids = self._ids(response_template, "response_template")
        self.instruction_token_ids = (
            None if instruction_template is None else self._ids(instruction_template, "instruction_template")
        )
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of
        self._flatten = DataCollatorWithFlattening(separator_id=ignore_index, **flattening)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates examples with `input_ids`; `labels` they may have are not looked at.

        Returns what `DataCollatorWithFlattening` does, or padded `input_ids`, `attention_mask` and `labels` (B, T).

        Raises PadfreeError naming the example if it has no response template (or none of the instruction template).
        """
        examples = []
        for i, feature in enumerate(features):
            tokens = _values(feature, "input_ids", i)
            labels = np.where(self._completions(tokens, i, len(features)), tokens, self.ignore_index)
            mask = feature.get("attention_mask", np.ones_like(tokens))
            examples.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
        return self._flatten(examples) if self.padding_free else self._padded(examples)

    def _completions(self, tokens: np.ndarray[Any, Any], index: int, count: int) -> np.ndarray[Any, Any]:
        """(T,): whether a token belongs to a completion."""
        trained = np.zeros(len(tokens), dtype=bool)
        response = self.response_token_ids
        begins = [at + len(response) for at in self._found(tokens, response, "response", index, count)]
        if self.instruction_token_ids is None:
            trained[begins[-1] :] = True
            return trained
        instructions = self._found(tokens, self.instruction_token_ids, "instruction", index, count)
        for begin in begins:
            trained[begin : next((at for at in instructions if at >= begin), len(tokens))] = True
        for begin in begins:  # a template is no completion, not even of the one before
            trained[begin - len(response) : begin] = False
        return trained

    @staticmethod
    def _found(tokens: np.ndarray[Any, Any], template: list[int], what: str, index: int, count: int) -> list[int]:
        """Where the template stands."""
        size = len(template)
        places = [at for at in range(len(tokens) - size + 1) if tokens[at : at + size].tolist() == template]
        if not places:
            raise PadfreeError(
                f"example {index} of {count} has no {what} template ({template}) in its {len(tokens)} tokens; "
                "it may have been cut off, or the tokenizer splits the text differently in its context (give token ids)"
            )
        return places

    def _ids(self, template: str | Sequence[int], name: str) -> list[int]:
        if isinstance(template, str):
            if self.tokenizer is None:
                raise PadfreeError(f"{name}={template!r} is text: pass tokenizer= too, or its token ids")
            template = self.tokenizer.encode(template, add_special_tokens=False)
        if not len(template):
            raise PadfreeError(f"{name} is empty")
        return [int(token) for token in template]

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
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
        return _as_tensors(batch, "pt")


def _values(feature: Mapping[str, Any], name: str, index: int) -> np.ndarray[Any, Any]:
    if feature.get(name) is None:
        raise PadfreeError(f"example {index} has no {name}; it has {', '.join(feature) or 'nothing'}")
    values = np.asarray(feature[name])
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise PadfreeError(f"example {index}: {name} must be integers (T,), found {values.dtype} {values.shape}")
    return values.astype(np.int64)


def _check_example(
    index: int, count: int, tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], attention_mask: Any
) -> None:
    if len(tokens) == 0:
        raise PadfreeError(f"example {index} of {count} has no tokens; drop empty examples from the data set")
    if len(labels) != len(tokens):
        raise PadfreeError(f"example {index} of {count} has {len(tokens)} tokens, but {len(labels)} labels")
    if attention_mask is not None and (padding := int((np.asarray(attention_mask) == 0).sum())):
        raise PadfreeError(f"example {index} of {count} is padded by {padding} tokens; tokenise with padding=False")


def _as_tensors(batch: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "np":
        return batch
    if kind != "pt":
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
