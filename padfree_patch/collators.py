"""Collators that flatten examples into one row instead of padding them, and say where each ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .batch.boundaries import lengths_of_segments
from .batch.labels import IGNORED_LABEL
from .batch.sequences import PackedSequences
from .errors import PadfreeError


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
        separator_id: label of each example's first token. None keeps the one it has: a patched model leaves it out of
            its own loss all the same (one computed outside the model, as with label smoothing, does not), and the
            Trainers of 4.46 to 5.9, which divide by the number of labels and count first tokens too, then count what
            they count in a padded batch.
        return_flash_attn_kwargs: return `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, and
            `packed_sequences`. An unpatched model refuses or ignores them.
        return_seq_idx: return `seq_idx`, the number of the example that a token belongs to, int32 (1, T).
        position_ids_start: position of each example's first token.
        pad_to_multiple_of: lengthen the row to a multiple of it by one more sequence, of padding, with labels -100.
        pad_token_id: what that sequence consists of.
        max_tokens: leave out what would make the row longer, examples at the end of the batch; `dropped_examples` and
            `dropped_tokens` count them, and a warning says so.
        token_fields: names of more fields with a value per token, which are joined like the tokens (padding: 0).
        example_fields: names of fields with a value per example, which are stacked: (examples, ...).
    """

    def __init__(
        self,
        return_tensors: str = "pt",
        *,
        return_position_ids: bool = True,
        separator_id: int | None = -100,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        position_ids_start: int = 0,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int = 0,
        max_tokens: int | None = None,
        token_fields: Sequence[str] = (),
        example_fields: Sequence[str] = (),
    ):
        self.return_tensors = return_tensors
        self.return_position_ids = return_position_ids
        self.separator_id = separator_id
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx
        self.position_ids_start = position_ids_start
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_token_id = pad_token_id
        self.max_tokens = max_tokens
        self.token_fields = token_fields
        self.example_fields = example_fields
        self.dropped_examples = self.dropped_tokens = 0

    def __call__(
        self,
        features: Sequence[Mapping[str, Any]],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> dict[str, Any]:
        """Flattens examples.

        Args:
            features: each with `input_ids` and, if one has them, `labels`, lists or 1-D tensors of one length. One that
                holds several examples itself (`pack_dataset`) says so by `seq_lengths`, `position_ids` that restart,
                `seq_idx` or an `attention_mask` of segment numbers.
            return_tensors, separator_id: instead of those given to the constructor.

        Returns int64 `input_ids` and `labels` (1, T), and what the constructor was asked for.

        Raises PadfreeError naming the example if one is empty, padded, or has labels of another length.
        """
        separator = self.separator_id if separator_id is None else separator_id
        if not features:
            raise PadfreeError("no examples to collate")
        tokens = [token_values(feature, "input_ids", i) for i, feature in enumerate(features)]
        has_labels = any("labels" in feature for feature in features)
        labels = [token_values(feature, "labels", i) for i, feature in enumerate(features)] if has_labels else tokens
        for i, feature in enumerate(features):
            _check_example(i, len(features), tokens[i], labels[i], feature.get("attention_mask"))
        kept = self._kept([len(each) for each in tokens])
        features, tokens, labels = features[:kept], tokens[:kept], labels[:kept]
        lengths = [length for i, each in enumerate(features) for length in _lengths_inside(each, len(tokens[i]), i)]
        padding = -sum(lengths) % (self.pad_to_multiple_of or 1)
        sequences = PackedSequences.from_lengths([*lengths, padding] if padding else lengths)
        positions = sequences.position_ids().numpy()
        joined = np.concatenate(labels)
        batch: dict[str, Any] = {
            "input_ids": _row(tokens, padding, self.pad_token_id),
            "labels": joined[None],
        }
        if separator is not None:
            batch["labels"] = np.where(positions[: len(joined)] == 0, separator, joined)[None]
        if padding:
            batch["labels"] = _row([batch["labels"][0]], padding, IGNORED_LABEL)
        if self.return_position_ids:
            batch["position_ids"] = (positions + self.position_ids_start)[None]
        if self.return_seq_idx:
            batch["seq_idx"] = np.repeat(np.arange(len(sequences), dtype=np.int32), sequences.lengths)[None]
        if self.return_flash_attn_kwargs:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = sequences.cu_seqlens.numpy()
            batch["max_length_q"] = batch["max_length_k"] = sequences.max_seqlen
        for name in self.token_fields:
            batch[name] = _row(_fields(features, name, tokens), padding, 0)
        for name in self.example_fields:
            batch[name] = stacked_fields(features, name)
        batch = as_tensors(batch, return_tensors or self.return_tensors)
        if self.return_flash_attn_kwargs:
            batch["packed_sequences"] = sequences
        return batch

    def _kept(self, lengths: list[int]) -> int:
        """How many of the features fit into `max_tokens`; counts the others."""
        if self.max_tokens is None:
            return len(lengths)
        multiple = self.pad_to_multiple_of or 1
        most = self.max_tokens // multiple * multiple  # what is added to reach a multiple counts
        if sum(lengths) <= most:
            return len(lengths)
        kept = int(np.searchsorted(np.cumsum(lengths), most, side="right"))
        if not kept:
            raise PadfreeError(
                f"the first example has {lengths[0]} tokens, more than max_tokens={self.max_tokens}"
                + (f" has room for in multiples of {multiple}" if multiple > 1 else "")
            )
        self.dropped_examples += len(lengths) - kept
        self.dropped_tokens += sum(lengths[kept:])
        warnings.warn(
            f"left out {len(lengths) - kept} of {len(lengths)} examples over max_tokens={self.max_tokens}; "
            "with TokenBudgetBatchSampler none has to be",
            stacklevel=3,
        )
        return kept


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
        pad_to_multiple_of: round the padded length up to it, or the row's.
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
        if padding_free and pad_to_multiple_of:
            pad = getattr(tokenizer, "pad_token_id", None)
            flattening = {"pad_to_multiple_of": pad_to_multiple_of, "pad_token_id": pad or 0, **flattening}
        self._flatten = DataCollatorWithFlattening(separator_id=ignore_index, **flattening)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates examples with `input_ids`; `labels` they may have are not looked at.

        One that holds several examples itself (`seq_lengths`, or `position_ids` that restart) needs a template in each,
        and `padding_free`.

        Returns what `DataCollatorWithFlattening` does, or padded `input_ids`, `attention_mask` and `labels` (B, T).

        Raises PadfreeError naming the example if it has no response template (or none of the instruction template), or
        nothing after it.
        """
        examples = []
        for i, feature in enumerate(features):
            tokens = token_values(feature, "input_ids", i)
            inside = _lengths_inside(feature, len(tokens), i)
            if len(inside) > 1 and not self.padding_free:
                raise PadfreeError(f"example {i} is a row of {len(inside)} examples, which needs padding_free=True")
            each = np.split(tokens, np.cumsum(inside)[:-1])
            trained = np.concatenate([self._completions(part, i, len(features)) for part in each])
            mask = np.asarray(feature.get("attention_mask", np.ones_like(tokens)))
            labels = np.where(trained & (mask != 0), tokens, self.ignore_index)
            examples.append({**feature, "input_ids": tokens, "labels": labels, "attention_mask": mask})
        return self._flatten(examples) if self.padding_free else self._padded(examples)

    def _completions(self, tokens: np.ndarray[Any, Any], index: int, count: int) -> np.ndarray[Any, Any]:
        """(T,): whether a token belongs to a completion."""
        trained = np.zeros(len(tokens), dtype=bool)
        response = self.response_token_ids
        begins = [at + len(response) for at in self._found(tokens, response, "response", index, count)]
        if self.instruction_token_ids is None:
            trained[begins[-1] :] = True
            return self._checked(trained, index, count)
        instructions = self._found(tokens, self.instruction_token_ids, "instruction", index, count)
        for begin in begins:
            trained[begin : next((at for at in instructions if at >= begin), len(tokens))] = True
        for begin in begins:  # a template is no completion, not even of the one before
            trained[begin - len(response) : begin] = False
        return self._checked(trained, index, count)

    @staticmethod
    def _checked(trained: np.ndarray[Any, Any], index: int, count: int) -> np.ndarray[Any, Any]:
        if not trained.any():
            raise PadfreeError(
                f"example {index} of {count} has nothing after its response template; it may have been cut off"
            )
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
        return as_tensors(batch, "pt")


def token_values(feature: Mapping[str, Any], name: str, index: int) -> np.ndarray[Any, Any]:
    """(T,) int64: a field of the feature that holds tokens or labels."""
    if feature.get(name) is None:
        raise PadfreeError(f"example {index} has no {name}; it has {', '.join(feature) or 'nothing'}")
    values = np.asarray(feature[name])
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise PadfreeError(f"example {index}: {name} must be integers (T,), found {values.dtype} {values.shape}")
    return values.astype(np.int64)


def _lengths_inside(feature: Mapping[str, Any], tokens: int, index: int) -> list[int]:
    """Tokens per example of a feature that may be a packed row of several."""
    found = {}
    if feature.get("seq_lengths") is not None:
        found["seq_lengths"] = token_values(feature, "seq_lengths", index).tolist()
    if feature.get("position_ids") is not None:
        positions = token_values(feature, "position_ids", index)
        if len(positions) != tokens:
            raise PadfreeError(f"example {index} has {tokens} tokens, but {len(positions)} position_ids")
        found["position_ids"] = list(PackedSequences.from_position_ids(torch.from_numpy(positions)).lengths)
    for name in ("attention_mask", "seq_idx"):
        if feature.get(name) is None:
            continue
        if name == "seq_idx" or np.asarray(feature[name]).max(initial=0) > 1:
            found[name] = lengths_of_segments(torch.from_numpy(token_values(feature, name, index)))
    if not found:
        return [tokens]
    lengths = next(iter(found.values()))
    if sum(lengths) != tokens or any(other != lengths for other in found.values()):
        said = " and ".join(f"{name} say {each}" for name, each in found.items())
        raise PadfreeError(f"example {index} has {tokens} tokens, but {said}")
    return lengths


def _row(parts: Sequence[np.ndarray[Any, Any]], padding: int, value: int) -> np.ndarray[Any, Any]:
    """(1, T): the parts one after the other, and padding."""
    return np.pad(np.concatenate(parts), (0, padding), constant_values=value)[None]


def stacked_fields(features: Sequence[Mapping[str, Any]], name: str) -> np.ndarray[Any, Any]:
    """(features, ...): a field of every feature."""
    return np.stack(_fields(features, name))


def _fields(
    features: Sequence[Mapping[str, Any]], name: str, tokens: Sequence[np.ndarray[Any, Any]] | None = None
) -> list[np.ndarray[Any, Any]]:
    """A field of every feature; as many values as tokens, if those are given."""
    found = []
    for i, feature in enumerate(features):
        if feature.get(name) is None:
            raise PadfreeError(f"example {i} of {len(features)} has no {name}; it has {', '.join(feature)}")
        found.append(_as_array(feature[name]))
        wanted = found[0].shape if tokens is None else (len(tokens[i]),)
        if found[i].shape != wanted or found[i].dtype.kind not in "iufb":
            raise PadfreeError(
                f"example {i} of {len(features)}: {name} must be numbers {wanted}, "
                f"found {found[i].dtype} {found[i].shape}"
            )
    return found


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    """As torch.tensor would make it of lists: floats are float32; numpy has no bfloat16."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 and not isinstance(value, np.ndarray) else array


def _check_example(
    index: int, count: int, tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], attention_mask: Any
) -> None:
    if len(tokens) == 0:
        raise PadfreeError(f"example {index} of {count} has no tokens; drop empty examples from the data set")
    if len(labels) != len(tokens):
        raise PadfreeError(f"example {index} of {count} has {len(tokens)} tokens, but {len(labels)} labels")
    if attention_mask is not None and (padding := int((np.asarray(attention_mask) == 0).sum())):
        raise PadfreeError(f"example {index} of {count} is padded by {padding} tokens; tokenise with padding=False")


def as_tensors(batch: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arrays as they are ("np") or as tensors ("pt")."""
    if kind == "np":
        return batch
    if kind != "pt":
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
