"""DataCollatorWithFlattening: upstream's newest, on every version."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
import transformers
from packaging import version

from padfree_patch import (
    DataCollatorWithFlattening,
    PackedSequences,
    PadfreeError,
    applied,
)
from padfree_patch.testing import conformance, examples

pytestmark = pytest.mark.versions


FEATURES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
    {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])},
    {"input_ids": [9, 10], "labels": [9, 10]},
]


def test_by_default_a_row_has_tokens_labels_and_positions():
    batch = DataCollatorWithFlattening()(FEATURES)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 10]],
        "labels": [[-100, 6, 7, -100, -100, 10]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_everything_that_can_be_asked_for():
    collator = DataCollatorWithFlattening(
        separator_id=-1, return_flash_attn_kwargs=True, return_seq_idx=True, position_ids_start=2
    )
    batch = collator(FEATURES)
    assert batch["labels"].tolist() == [[-1, 6, 7, -1, -1, 10]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 2, 3]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == batch["seq_idx"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert type(batch["max_length_q"]) is int
    assert batch["packed_sequences"] == PackedSequences.from_lengths([3, 1, 2])


def test_labels_default_to_the_tokens():
    features = [{"input_ids": feature["input_ids"]} for feature in FEATURES]
    assert DataCollatorWithFlattening()(features)["labels"].tolist() == [[-100, 6, 7, -100, -100, 10]]


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_position_ids": False},
        {"separator_id": -7},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"position_ids_start": 2},
    ],
    ids=str,
)
def test_gives_what_upstreams_gives(options, return_tensors):
    upstream = getattr(transformers, "DataCollatorWithFlattening", None)
    unknown = set(options) - set(inspect.signature(upstream.__init__).parameters) if upstream else {"all"}
    if unknown:
        pytest.skip(f"transformers {transformers.__version__} does not know {unknown}")
    lists = [{name: list(map(int, value)) for name, value in feature.items()} for feature in FEATURES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # up to 4.56: "make sure your attention computation is able to handle it"
        expected = upstream(**options, return_tensors=return_tensors)(lists)
    found = DataCollatorWithFlattening(return_tensors, **options)(FEATURES)
    assert set(found) - set(expected) <= {"packed_sequences", "labelled_rows"}
    for name, value in expected.items():
        assert type(found[name]) is type(value)
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None)


def test_takes_all_arguments_of_upstreams():
    upstream = getattr(transformers, "DataCollatorWithFlattening", None)
    if upstream is None:
        pytest.skip(f"transformers {transformers.__version__} has no DataCollatorWithFlattening")
    theirs = inspect.signature(upstream.__init__).parameters
    ours = inspect.signature(DataCollatorWithFlattening.__init__).parameters
    for name, parameter in theirs.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert ours[name].default == parameter.default, name


def test_any_iterable_of_examples_is_a_batch():
    expected = DataCollatorWithFlattening()(FEATURES)
    for features in (iter(FEATURES), tuple(FEATURES), (each for each in FEATURES)):
        assert torch.equal(DataCollatorWithFlattening()(features)["labels"], expected["labels"])


def test_keeping_first_labels_warns_where_the_trainer_does_not_count_them():
    """transformers 5.10 and later count `labels[..., 1:]`: of a padded batch none of the first ones."""
    if version.parse(transformers.__version__) < version.parse("5.10"):
        DataCollatorWithFlattening(separator_id=None)
    else:
        with pytest.warns(UserWarning, match="separator_id=None makes this Trainer count a label for every example"):
            DataCollatorWithFlattening(separator_id=None)


@pytest.mark.parametrize("return_position_ids", [True, False])
@pytest.mark.parametrize("start", [0, 2])
def test_lengths_pass_through_a_patched_model(make, return_position_ids, start):
    sequences = examples((5, 9, 1))
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True,
        return_seq_idx=True,
        return_position_ids=return_position_ids,
        position_ids_start=start,
    )
    batch = collator([{"input_ids": each[0]} for each in sequences])
    alone = conformance.logits_alone(make, sequences)
    with applied(make()) as model, torch.no_grad():
        for leave_out in ((), ("packed_sequences",)):
            packed = model(**{name: value for name, value in batch.items() if name not in leave_out}).logits
            error = conformance.largest(packed - alone) / conformance.largest(alone)
            assert error < conformance.LOGIT_TOLERANCE
        with pytest.raises((TypeError, AssertionError)):  # the control: unpatched, they are refused or ignored
            for name in ("packed_sequences", "labelled_rows"):
                del batch[name]
            naive = make()(**batch).logits
            assert conformance.largest(naive - alone) < conformance.LOGIT_TOLERANCE


def test_padding_is_one_more_sequence_that_trains_nothing():
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True, pad_to_multiple_of=4, pad_token_id=9
    )
    batch = collator([{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert batch["packed_sequences"].lengths == (2, 3, 3)
    assert collator([{"input_ids": [1, 2, 3, 4]}])["packed_sequences"].lengths == (4,)


def test_padding_is_ignored_whatever_separates_the_examples():
    batch = DataCollatorWithFlattening(separator_id=-1, pad_to_multiple_of=4)(
        [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    )
    assert batch["labels"].tolist() == [[-1, 2, -1, -100]]


def test_what_is_over_max_tokens_is_left_out_and_counted():
    collator = DataCollatorWithFlattening(max_tokens=5)
    features = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7]}]
    assert collator(features[:2])["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert (collator.dropped_examples, collator.dropped_tokens) == (0, 0)
    with pytest.warns(UserWarning, match="left out 2 of 4 examples over max_tokens=5; with TokenBudgetBatchSampler"):
        assert collator(features)["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert (collator.dropped_examples, collator.dropped_tokens) == (2, 3)
    with pytest.raises(PadfreeError, match="the first example has 6 tokens, more than max_tokens=5"):
        collator([{"input_ids": [1] * 6}])


def test_other_fields_are_carried_per_token_and_per_example():
    features = [
        {"input_ids": [1, 2], "weight": [0.5, 1.0], "score": 3.0, "pair": [1, 2]},
        {"input_ids": [3], "weight": [2.0], "score": 4.0, "pair": [3, 4]},
    ]
    collator = DataCollatorWithFlattening(
        token_fields=["weight"], example_fields=["score", "pair"], pad_to_multiple_of=4
    )
    batch = collator(features)
    assert batch["weight"].tolist() == [[0.5, 1.0, 2.0, 0.0]]
    assert batch["score"].tolist() == [3.0, 4.0]
    assert batch["pair"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(PadfreeError, match=r"example 1 of 2: weight must be numbers \(1,\), found float32 \(2,\)"):
        collator([features[0], {**features[1], "weight": [1.0, 2.0]}])
    with pytest.raises(PadfreeError, match="example 1 of 2 has no score"):
        collator([features[0], {"input_ids": [3], "weight": [2.0], "pair": [3, 4]}])


@pytest.mark.parametrize("masks", [("completion_mask",), ("assistant_masks",), ("completion_mask", "assistant_masks")])
@pytest.mark.parametrize("labels", [{}, {"labels": [5, -100, 6, 9]}], ids=["tokens", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda mask: torch.tensor(mask, dtype=torch.bool)])
def test_tokens_that_a_mask_leaves_out_are_not_trained(masks, labels, kind):
    """As TRL's collators read these columns: a label is kept where all of them are 1."""
    values = {"completion_mask": [1, 0, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    row = {"input_ids": [5, 7, 6, 9], **labels}
    batch = DataCollatorWithFlattening()([{**row, **{name: kind(values[name]) for name in masks}}])
    trained = np.all([values[name] for name in masks], axis=0)
    expected = [label if keep else -100 for label, keep in zip(labels.get("labels", row["input_ids"]), trained)]
    assert batch["labels"].tolist() == [[-100, *expected[1:]]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    everything = DataCollatorWithFlattening()([row])["labels"].tolist()  # the control
    assert everything != batch["labels"].tolist() or (labels and masks == ("completion_mask",))  # it has -100 there


@pytest.mark.parametrize(
    "field",
    [
        {"attention_mask": [1, 1, 2, 2]},
        {"seq_idx": [0, 0, 1, 1]},
        {"cu_seq_lens_q": [0, 2, 4], "max_length_q": 2},
        {"packed_sequences": PackedSequences.from_lengths([2, 2])},
    ],
    ids=str,
)
def test_segment_numbers_of_a_row_are_boundaries(field):
    batch = DataCollatorWithFlattening()([{"input_ids": [1, 2, 3, 4], **field}])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    with pytest.raises(PadfreeError, match="has 4 tokens, but seq_lengths say"):
        DataCollatorWithFlattening()([{"input_ids": [1, 2, 3, 4], "seq_lengths": [3, 1], **field}])


def test_masks_of_truth_values_are_masks():
    features = [{"input_ids": [1, 2], "attention_mask": [True, True]}, {"input_ids": [3], "attention_mask": [True]}]
    assert DataCollatorWithFlattening()(features)["position_ids"].tolist() == [[0, 1, 0]]


def test_max_tokens_bounds_the_padded_row():
    collator = DataCollatorWithFlattening(max_tokens=10, pad_to_multiple_of=8)
    with pytest.warns(UserWarning, match="left out 1 of 2 examples"):
        batch = collator([{"input_ids": [1] * 5}, {"input_ids": [2] * 4}])
    assert batch["input_ids"].shape == (1, 8)


def test_fields_are_float32_as_torch_makes_them():
    collator = DataCollatorWithFlattening(example_fields=["score"])
    assert collator([{"input_ids": [1], "score": 0.5}])["score"].dtype == torch.float32
    bfloat16 = torch.tensor(0.5, dtype=torch.bfloat16)
    assert collator([{"input_ids": [1], "score": bfloat16}])["score"].tolist() == [0.5]
