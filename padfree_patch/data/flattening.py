"""A collator that flattens examples into one row instead of padding them, and says where each ends."""

from __future__ import annotations

import bisect
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch

from .. import versions
from ..arguments import Integers, names, number_of_64_bits, whole_number
from ..batch.labelled_rows import LabelledRows
from ..batch.labels import IGNORED_LABEL, ignore_first_labels
from ..batch.sequences import PackedSequences
from ..batch.shared_row import SharedRow
from ..errors import PadfreeError
from .fields import (
    READ,
    Batch,
    Feature,
    LeftOut,
    Numbers,
    as_tensors,
    check_example,
    join_row,
    label_masks,
    list_of_examples,
    stack_field,
    token_field,
    token_values,
    trained_tokens,
)
from .lengths_inside import lengths_inside
from .sharing import Layout, check_can_share, check_labelled, layout_of


class RowOptions(TypedDict, total=False):
    """Arguments of `DataCollatorWithFlattening` that change neither examples nor labels."""

    return_tensors: str
    return_position_ids: bool
    return_flash_attn_kwargs: bool
    return_seq_idx: bool
    position_ids_start: int


class FlatteningOptions(RowOptions, total=False):
    """Arguments of `DataCollatorWithFlattening` that other collators pass on to it."""

    pad_token_id: int
    max_tokens: int | None
    token_fields: Sequence[str]
    example_fields: Sequence[str]
    share_prefixes: bool


class DataCollatorWithFlattening:
    """Flattens a batch of examples into one row (1, T) without padding; upstream's newest, on every version.

    Arguments, defaults and results are those of `transformers.DataCollatorWithFlattening` 5.23, with two differences.
    An example without tokens, with padding, or with labels of another length is an error. And beside the
    FlashAttentionKwargs the batch holds `packed_sequences`, the lengths as Python integers, and `labelled_rows`, the
    tokens that predict a label, from which a patched model works without reading anything back from the device.

    TRL's columns `completion_mask` and `assistant_masks` are read as TRL reads them: where one has a 0, the label
    becomes -100. Drop the column to train on every token.

    The label of each example's first token becomes `separator_id`, so that no example is trained to predict the
    beginning of the next one. How many sequences flash-attn's varlen backward can take at once,
    (tokens + 128 * sequences) * heads * head_dim rounded up to 32 < 2**31, depends on the model: the flash_attn backend
    checks it when the batch arrives there.

    Args:
        return_tensors: "pt" or "np".
        return_position_ids: return `position_ids`, which restart at `position_ids_start` for every example.
        separator_id: label of each example's first token. None keeps each first label. A patched model still ignores
            it; a loss computed outside the model, as with label smoothing, does not. Use None only to match a padded
            run on Trainers 4.46 to 5.9, which divide by the number of labels and count first labels. Later ones leave
            out the first label of a row, and would count those of a packed row: None warns there.
        return_flash_attn_kwargs: return `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`,
            `packed_sequences` and `labelled_rows`. An unpatched model refuses or ignores them.
        return_seq_idx: return `seq_idx`, the number of the example that a token belongs to, int32 (1, T).
        position_ids_start: position of each example's first token.
        pad_to_multiple_of: lengthen the row to a multiple of it by one more sequence, of padding, with labels -100. The
            batch then holds `packed_sequences`, which tell a patched mixture of experts what not to count; a model that
            is not patched may refuse them by a TypeError.
        pad_token_id: the token that this sequence repeats.
        max_tokens: most tokens of a row. Examples at the end of the batch that would make it longer are left out;
            `dropped_examples` and `dropped_tokens` count them, and a warning says so.
        token_fields: names of more fields with a value per token, which are joined like the tokens (padding: 0; of
            `position_ids` 0, 1, 2, ...).
        example_fields: names of fields with a value per example, which are stacked: (examples, ...).
        share_prefixes: let examples of a batch that begin with the same tokens share them, if nobody is trained on
            those (negative labels): several answers to one prompt, as for GRPO, RLOO, best-of-n and rewards. What they
            share is computed once. The batch holds `packed_sequences`, with `prefixes`, and is for a patched model
            only: any other fails on its `input_ids`. Lengths in other forms would say something else and are left out.
    """

    def __init__(
        self,
        return_tensors: str = "pt",
        *,
        return_position_ids: bool = True,
        separator_id: int | None = IGNORED_LABEL,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        position_ids_start: int = 0,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int = 0,
        max_tokens: int | None = None,
        token_fields: Sequence[str] = (),
        example_fields: Sequence[str] = (),
        share_prefixes: bool = False,
    ):
        if share_prefixes:
            check_can_share(return_seq_idx=return_seq_idx, token_fields=token_fields)
        if separator_id is None and versions.transformers(">=5.10"):
            warnings.warn(
                "separator_id=None makes this Trainer count a label for every example of a row but the first, which "
                "a padded run of transformers 5.10 and later does not count; leave separator_id out",
                stacklevel=2,
            )
        self.return_tensors = return_tensors
        self.return_position_ids = return_position_ids
        self.separator_id = None if separator_id is None else number_of_64_bits(separator_id, "separator_id")
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx
        self.position_ids_start = number_of_64_bits(position_ids_start, "position_ids_start")
        multiple = 0 if pad_to_multiple_of is None else whole_number(pad_to_multiple_of, "pad_to_multiple_of", 0)
        self.pad_to_multiple_of = multiple or None
        self.pad_token_id = 0 if pad_token_id is None else number_of_64_bits(pad_token_id, "pad_token_id")
        self.max_tokens = None if max_tokens is None else whole_number(max_tokens, "max_tokens", 1)
        self.token_fields = names(token_fields, "token_fields")
        self.example_fields = names(example_fields, "example_fields")
        self.share_prefixes = share_prefixes
        self.dropped_examples = self.dropped_tokens = 0
        self._left_out = LeftOut(
            "name a field with a value per token in token_fields=, one with a value per example in example_fields=, or "
            "remove the column from the data set"
        )

    def __call__(
        self,
        features: Iterable[Feature],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> Batch:
        """Flattens examples.

        Args:
            features: each with `input_ids` and, if one has them, `labels`, lists or 1-D tensors of one length. One that
                holds several examples itself (`pack_dataset`) says so by `seq_lengths`, `position_ids` that restart,
                `seq_idx`, `cu_seq_lens_q` or an `attention_mask` of segment numbers. A warning names fields that are
                left out.
            return_tensors, separator_id: instead of those given to the constructor.

        Returns int64 `input_ids` and `labels` (1, T), and what the constructor was asked for.

        Raises PadfreeError naming the example if one is empty, padded, or has labels or a mask of another length.
        """
        kind = return_tensors or self.return_tensors
        if self.share_prefixes and kind != "pt":
            raise PadfreeError(f"share_prefixes=True makes tensors for a patched model, not return_tensors={kind!r}")
        features = list_of_examples(features)
        self._left_out.warn_of(features, {*READ, *self.token_fields, *self.example_fields})
        tokens, labels = _tokens_and_labels(features)
        separator = self.separator_id if separator_id is None else number_of_64_bits(separator_id, "separator_id")
        first = functools.partial(self._first_examples, features, tokens, labels, keeps_first=separator is None)
        fitting = self._count_that_fit([len(each) for each in tokens], first)
        features, tokens, labels = features[:fitting], tokens[:fitting], labels[:fitting]
        layout = first(fitting)
        padding = -sum(layout.lengths) % (self.pad_to_multiple_of or 1)
        sequences = layout.sequences(padding)
        row_labels = _joined_labels(layout.take(labels), layout.lengths, padding, separator)
        fields: dict[str, object] = {
            "input_ids": join_row([layout.take(tokens)], padding, self.pad_token_id),
            "labels": row_labels,
            **self._boundaries(sequences),
            **{name: _joined_field(features, name, tokens, layout, padding) for name in self.token_fields},
            **{name: stack_field(features, name) for name in self.example_fields},
        }
        batch = as_tensors(fields, kind)
        if self.return_flash_attn_kwargs or self.share_prefixes or padding:  # of which nothing else tells
            batch["packed_sequences"] = sequences
        if self.return_flash_attn_kwargs or self.share_prefixes:
            batch["labelled_rows"] = LabelledRows.of(torch.from_numpy(row_labels), sequences)
        if sequences.prefixes is not None:
            batch["input_ids"] = batch["input_ids"].as_subclass(SharedRow)
        return batch

    def _first_examples(
        self,
        features: Sequence[Feature],
        tokens: Sequence[Integers],
        labels: Sequence[Integers],
        count: int,
        *,
        keeps_first: bool,
    ) -> Layout:
        """Returns how the first examples of a batch stand in a row; one may itself be a packed row of several."""
        keeps = "position_ids" in self.token_fields
        counts = [len(each) for each in tokens[:count]]
        inside = [
            lengths_inside(feature, tokens, i, keeps_positions=keeps)
            for i, (feature, tokens) in enumerate(zip(features, counts))
        ]
        lengths = list(itertools.chain.from_iterable(inside))
        if not self.share_prefixes:
            return Layout(lengths)
        check_labelled(features)
        unlabelled = np.concatenate(labels[:count]) < 0
        if not keeps_first:  # nothing predicts the first label of an example
            unlabelled[np.cumsum([0, *lengths[:-1]])] = True
        fields = [np.concatenate(token_field(features[:count], name, counts)) for name in self.token_fields]
        return layout_of(lengths, unlabelled, [np.concatenate(tokens[:count]), *fields])

    def _count_that_fit(self, lengths: list[int], first: Callable[[int], Layout]) -> int:
        """Returns how many of the examples `max_tokens` has room for; counts the others as dropped, with a warning.

        `first` gives the layout of so many of them.
        """
        if self.max_tokens is None:
            return len(lengths)
        multiple = self.pad_to_multiple_of or 1
        most = self.max_tokens // multiple * multiple  # what is added to reach a multiple counts
        if sum(lengths) <= most:
            return len(lengths)
        if self.share_prefixes:
            counts = range(1, len(lengths) + 1)
            fitting = bisect.bisect_right(counts, most, key=lambda count: sum(first(count).lengths))
        else:
            fitting = int(np.searchsorted(np.cumsum(lengths), most, side="right"))
        if fitting == len(lengths):
            return fitting
        if not fitting:
            raise PadfreeError(
                f"the first example has {lengths[0]} tokens, more than max_tokens={self.max_tokens}"
                + (f" has room for in multiples of {multiple}" if multiple > 1 else "")
            )
        self.dropped_examples += len(lengths) - fitting
        self.dropped_tokens += sum(lengths[fitting:])
        warnings.warn(
            f"left out {len(lengths) - fitting} of {len(lengths)} examples over max_tokens={self.max_tokens}; "
            "with TokenBudgetBatchSampler none has to be",
            stacklevel=3,
        )
        return fitting

    def _boundaries(self, sequences: PackedSequences) -> dict[str, object]:
        """Returns what says where the sequences end, in each of the forms that were asked for."""
        forms: dict[str, object] = {}
        if self.return_position_ids:
            forms["position_ids"] = (sequences.position_ids().numpy() + self.position_ids_start)[None]
        if sequences.prefixes is not None:
            return forms
        if self.return_seq_idx:
            forms["seq_idx"] = np.repeat(np.arange(len(sequences), dtype=np.int32), sequences.lengths)[None]
        if self.return_flash_attn_kwargs:
            forms["cu_seq_lens_q"] = forms["cu_seq_lens_k"] = sequences.cu_seqlens.numpy()
            forms["max_length_q"] = forms["max_length_k"] = sequences.max_seqlen
        return forms


def _tokens_and_labels(features: Sequence[Feature]) -> tuple[list[Integers], list[Integers]]:
    """Returns the tokens and the labels of each example; where no example has labels, the tokens are the labels.

    What TRL's masks leave out of the training has the label -100.
    """
    if not features:
        raise PadfreeError("no examples to collate")
    tokens = [token_values(feature, "input_ids", i) for i, feature in enumerate(features)]
    has_labels = any("labels" in feature for feature in features)
    labels = [token_values(feature, "labels", i) for i, feature in enumerate(features)] if has_labels else tokens
    for i, feature in enumerate(features):
        check_example(feature, tokens[i], labels[i], f"example {i} of {len(features)}")
    if masks := label_masks(features):
        trained = [trained_tokens(feature, masks, len(tokens[i]), i) for i, feature in enumerate(features)]
        labels = [np.where(mask, each, IGNORED_LABEL) for mask, each in zip(trained, labels)]
    return tokens, labels


def _joined_field(
    features: Sequence[Feature], name: str, tokens: Sequence[Integers], layout: Layout, padding: int
) -> Numbers:
    """Joins a field with a value per token into a row (1, T). Padding has zeros; as positions 0, 1, 2, ..."""
    values = layout.take(token_field(features, name, [len(each) for each in tokens]))
    return join_row([values, np.arange(padding)], 0, 0) if name == "position_ids" else join_row([values], padding, 0)


def _joined_labels(labels: Numbers, lengths: list[int], padding: int, separator: int | None) -> Numbers:
    """Makes a row (1, T) of labels, each sequence's first one replaced by the separator if there is one."""
    joined = torch.from_numpy(labels)
    if separator is not None:
        joined = ignore_first_labels(joined, PackedSequences.from_lengths(lengths), label=separator)
    return join_row([joined.numpy()], padding, IGNORED_LABEL)
