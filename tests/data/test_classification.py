"""The collator for examples with one label each."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import DataCollatorForSequenceClassification, PadfreeError

ROWS = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]


def collated(labels, name="label", **options):
    return DataCollatorForSequenceClassification(**options)([{**row, name: each} for row, each in zip(ROWS, labels)])


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
@pytest.mark.parametrize(
    ("labels", "dtype"), [([2, 0], torch.int64), ([0.5, 1.5], torch.float32), ([[1.0, 0.0], [0.0, 1.0]], torch.float32)]
)
def test_labels_are_of_examples(name, labels, dtype):
    batch = collated(labels, name)
    torch.testing.assert_close(batch["labels"], torch.tensor(labels, dtype=dtype))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["packed_sequences"].lengths == (3, 2)
    assert "label" not in batch and "label_ids" not in batch


def test_options_of_flattening_go_on():
    batch = collated([1, 0], pad_to_multiple_of=8, return_flash_attn_kwargs=False)
    assert batch["packed_sequences"].padding == 3 and "cu_seq_lens_q" not in batch
    with pytest.warns(UserWarning, match="left out 1 of 2 examples"):
        assert collated([1, 0], max_tokens=4)["labels"].tolist() == [1]
    more = DataCollatorForSequenceClassification(example_fields=["weight"])
    batch = more([{**row, "label": 1, "weight": 0.5} for row in ROWS])
    assert batch["weight"].tolist() == [0.5, 0.5] and batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS, r"example 0 must have one label, as label, labels or label_ids; it has input_ids"),
        ([{**ROWS[0], "label": 1}, {**ROWS[1], "label": None}], "example 1 must have one label"),
        ([{**ROWS[0], "label": 1, "labels": [5, 6, 7]}], "it has input_ids, label, labels"),
        ([{**ROWS[0], "label": "good"}], "label"),
        ([{"input_ids": [], "label": 1}], "empty|no tokens|has 0 tokens"),
    ],
)
def test_wrong_labels_are_said(rows, message):
    with pytest.raises(PadfreeError, match=message):
        DataCollatorForSequenceClassification()(rows)
