"""What DataCollatorWithFlattening cannot collate is an error that names the example; what it leaves out, a warning."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import DataCollatorWithFlattening, PadfreeError

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "no examples"),
        ([{"input_ids": [1]}, {"input_ids": []}], "example 1 of 2 has no tokens; drop"),
        ([{"labels": [1]}], "example 0 has no input_ids; it has labels"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "example 1 has no labels; it has input_ids"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "example 0 has no labels"),
        ([{"input_ids": [1], "labels": None}], "example 0 has no labels"),
        ([{"input_ids": [1.5, 2]}], r"example 0: input_ids must be integers \(T,\), found float64 \(2,\)"),
        ([{"input_ids": [[1, 2]]}], r"example 0: input_ids must be integers"),
        ([{"input_ids": [1, 2], "labels": [1]}], "example 0 of 1 has 2 tokens, but 1 labels"),
        ([{"input_ids": [1, 0, 0], "attention_mask": [1, 0, 0]}], "example 0 of 1 is padded by 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "example 0 of 1 has 2 tokens, but 1 values in its att"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0.5]}], "attention_mask must be whole numbers, found 0.5"),
        (
            [{"input_ids": [1, 2], "completion_mask": [1]}],
            "example 0 has 2 tokens, but 1 values in its completion_mask",
        ),
        ([{"input_ids": [1, 2], "completion_mask": ["a", "b"]}], r"completion_mask must be numbers \(T,\)"),
        (
            [{"input_ids": [1], "completion_mask": [1]}, {"input_ids": [1]}],
            "example 1 has no completion_mask, but others",
        ),
        ([{"input_ids": [1, 2], "labels": 1}], "labels is 1, one value for the whole example, as for classification"),
        ([{"input_ids": [1, 2], "labels": torch.tensor(0.5)}], "labels is 0.5, one value for the whole example"),
        ([{"input_ids": [[1], [2, 3]]}], "example 0: input_ids must be numbers of one shape, found a list"),
        ([{"input_ids": [1, None]}], r"example 0: input_ids must be integers \(T,\), found object"),
        ([{"input_ids": [2**63]}], "example 0: input_ids must be integers .* found 9223372036854775808"),
        ([{"input_ids": [1, 2**64]}], "example 0: input_ids must be integers"),
        ([{"input_ids": "text"}], "example 0: input_ids must be integers"),
        ([{"input_ids": [5, True]}], "example 0: input_ids must be integers .* truth values"),  # numpy reads 5, 1
        ([{"input_ids": [5, 6, 7], "seq_lengths": [2, True]}], "0: seq_lengths must be integers .* truth values"),
        ([{"input_ids": torch.tensor([1, 2]).bfloat16()}], r"input_ids must be integers \(T,\), found bfloat16 \(2,\)"),
        ([[1, 2]], "example 0 must be a dict of fields such as input_ids, found list"),
        ({"input_ids": [[1, 2]]}, "takes a list of examples, each a dict of fields, found dict of input_ids"),
        ("text", "takes a list of examples, each a dict of fields, found str"),
        ([{"input_ids": torch.eye(2).to_sparse()}], "example 0: input_ids must be numbers of one shape"),
        (torch.tensor(3), "takes a list of examples, each a dict of fields, found Tensor"),
        (None, "takes a list of examples, each a dict of fields, found NoneType"),
    ],
)
def test_bad_examples_are_named(features, message):
    with pytest.raises(PadfreeError, match=message):
        DataCollatorWithFlattening()(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, 1 or more, found 2.5"),
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more, found 0"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of must be a whole number, 0 or more, found -8"),
        ({"position_ids_start": None}, "position_ids_start must be a whole number, found None"),
        ({"separator_id": "x"}, "separator_id must be a whole number, found 'x'"),
        ({"separator_id": 2**70}, "separator_id must be a whole number of 64 bits, found 11805"),
        ({"example_fields": None}, "example_fields must be a list of names, such as"),
        ({"pad_token_id": float("nan")}, "pad_token_id must be a whole number, found nan"),
        ({"token_fields": "weight"}, "token_fields must be a list of names, such as"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(options, message):
    with pytest.raises(PadfreeError, match=message):
        DataCollatorWithFlattening(**options)


def test_separator_of_one_call_is_checked_too():
    with pytest.raises(PadfreeError, match="separator_id must be a whole number, found 'x'"):
        DataCollatorWithFlattening()([{"input_ids": [1]}], separator_id="x")


def test_unknown_return_tensors_is_refused():
    with pytest.raises(PadfreeError, match="return_tensors='tf'"):
        DataCollatorWithFlattening("tf")([{"input_ids": [1]}])


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ({"seq_lengths": [1, 1]}, r"example 0 has 3 tokens, but seq_lengths say \[1, 1\]"),
        ({"position_ids": [0, 1]}, "example 0 has 3 tokens, but 2 position_ids"),
        ({"cu_seq_lens_q": [0, 2]}, r"example 0 has 3 tokens, but cu_seq_lens_q say \[2\]"),
        ({"cu_seq_lens_q": [1, 4]}, "cu_seqlens start at 1, not at 0"),
        ({"seq_lengths": [5, -2]}, "sequence 1 has length -2"),
        ({"packed_sequences": [1, 2]}, "example 0: packed_sequences must be PackedSequences, found list"),
        ({"seq_lengths": [1, 2], "label_ids": [-2, -1]}, r"seq_lengths say \[1, 2\] and label_ids say \[2, 1\]"),
        ({"seq_lengths": [1, 2], "position_ids": [0, 1, 0]}, r"seq_lengths say \[1, 2\] and position_ids say \[2, 1\]"),
    ],
)
def test_packed_rows_that_contradict_themselves_are_errors(boundaries, message):
    with pytest.raises(PadfreeError, match=message):
        DataCollatorWithFlattening()([{"input_ids": [1, 2, 3], **boundaries}])


def test_fields_that_are_left_out_are_named_once():
    features = [{"input_ids": [1, 2], "weight": [0.5, 1.0], "text": None, "score": 3.0}]
    collator = DataCollatorWithFlattening(example_fields=["score"])
    with pytest.warns(UserWarning, match="leaves out weight: name a field with a value per token in token_fields="):
        assert set(collator(features)) == {"input_ids", "labels", "position_ids", "score"}
    collator(features)  # a second warning would be an error
