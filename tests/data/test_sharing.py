"""Collators share what examples of a batch begin with, if nobody is trained on it, and say so in the batch."""

from __future__ import annotations

import pickle

import pytest
import torch

from padfree_patch import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPreference,
    DataCollatorWithFlattening,
    PackedSequences,
    PadfreeError,
    unpack,
)
from padfree_patch.batch.shared_row import SharedRow


def example(prompt, answer, **more):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + [*answer], **more}


def collated(rows, **options):
    return DataCollatorWithFlattening(share_prefixes=True, **options)(rows)


def test_prompt_stands_once_without_its_last_token_before_the_first_answer():
    batch = collated([example([5, 6, 7], [20, 21]), example([9], [8]), example([5, 6, 7], [30])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 20, 21, 9, 8, 7, 30]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 20, 21, -100, 8, -100, 30]]
    sequences = batch["packed_sequences"]
    assert (sequences.lengths, sequences.prefixes) == ((2, 3, 2, 2), (-1, 0, -1, 0))
    assert "cu_seq_lens_q" not in batch


def test_nothing_to_share_is_an_ordinary_row():
    rows = [example([5, 6], [20]), example([6, 5], [21])]
    batch = collated(rows, return_flash_attn_kwargs=True)
    plain = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    assert not isinstance(batch["input_ids"], SharedRow) and batch["packed_sequences"].prefixes is None
    assert batch.keys() == plain.keys() and all(
        torch.equal(batch[name], plain[name]) for name in plain if isinstance(plain[name], torch.Tensor)
    )


def test_tokens_with_labels_are_not_shared():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 2
    assert collated(rows)["packed_sequences"].prefixes is None
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 0, 1]}] * 2
    assert collated(rows)["packed_sequences"].lengths == (2, 2, 2)


def test_first_token_counts_as_unlabelled_unless_its_label_is_kept():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}] * 2
    assert collated(rows)["packed_sequences"].prefixes == (-1, 0, 0)
    if not torch.equal(DataCollatorWithFlattening()(rows)["labels"], collated(rows)["labels"]):
        assert (collated(rows)["labels"] >= 0).sum() == 2


def test_examples_are_grouped_so_that_the_row_is_shortest():
    """All begin with 1 2 3; sharing only that would save less than the two longer prompts do."""
    one, other = [1, 2, 3, *range(10, 20)], [1, 2, 3, *range(30, 40)]
    rows = [example(prompt, [50 + i]) for i, prompt in enumerate((one, other, one, other, [1, 2, 3]))]
    sequences = collated(rows)["packed_sequences"]
    assert sequences.lengths == (12, 2, 12, 2, 2, 2, 4) and sequences.prefixes == (-1, 0, -1, 2, 0, 2, -1)
    others = [
        example([1, 2, 3, 20 + i], [7]) for i in range(9)
    ]  # two tokens of eleven examples are more than 12 of two
    assert collated([*(example(one, [i]) for i in range(2)), *others])["packed_sequences"].prefixes.count(0) == 11


def test_examples_come_back_from_the_row_with_every_field():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(40):
        prompt = torch.randint(3, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator).tolist()
        answer = torch.randint(3, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist()
        weights = [0.5] * len(prompt) + [float(token) for token in answer]
        rows.append(example(prompt, answer, weight=weights, reward=float(len(answer))))
    batch = collated(rows, token_fields=["weight"], example_fields=["reward"])
    sequences = batch["packed_sequences"]
    assert sequences.total < sum(len(row["input_ids"]) for row in rows)
    for name in ("input_ids", "weight"):
        found = unpack(batch[name], sequences, with_prompts=True)
        assert [each.tolist() for each in found] == [pytest.approx(row[name]) for row in rows]
    assert batch["reward"].tolist() == [row["reward"] for row in rows]
    labelled = [[label for label in each.tolist() if label >= 0] for each in unpack(batch["labels"], sequences)]
    assert labelled == [[label for label in row["labels"] if label >= 0] for row in rows]


def test_tokens_whose_other_fields_differ_are_not_shared():
    rows = [example([5, 6, 7], [8], weight=[1.0, 1.0, weight, 1.0]) for weight in (1.0, 2.0)]
    assert collated(rows, token_fields=["weight"])["packed_sequences"].lengths == (1, 3, 3)


def test_packed_rows_share_with_each_other():
    row = {"input_ids": [5, 6, 7, 5, 6, 8], "labels": [-100, -100, 7, -100, -100, 8], "seq_lengths": [3, 3]}
    assert collated([row, example([5, 6], [9])])["packed_sequences"].prefixes == (-1, 0, 0, 0)


def test_padding_and_a_most_of_tokens_count_what_stands_in_the_row():
    rows = [example([5] * 9, [i]) for i in range(4)]  # 8 tokens, and 2 for each answer
    batch = collated(rows, pad_to_multiple_of=10)
    assert batch["input_ids"].shape == (1, 20) and batch["packed_sequences"].padding == 4
    assert len(unpack(batch["labels"], batch["packed_sequences"])) == 5
    collator = DataCollatorWithFlattening(share_prefixes=True, max_tokens=14)
    with pytest.warns(UserWarning, match="left out 1 of 4 examples"):
        assert collator(rows)["packed_sequences"].lengths == (8, 2, 2, 2)


def test_row_travels_as_an_ordinary_tensor_would():
    ids = collated([example([5, 6, 7], [20]), example([5, 6, 7], [30])])["input_ids"]
    for moved in (ids.to("cpu"), ids.clone(), pickle.loads(pickle.dumps(ids))):
        assert isinstance(moved, SharedRow) and moved.tolist() == [[5, 6, 7, 20, 7, 30]]
    assert type(ids.plain()) is torch.Tensor
    with pytest.raises(PadfreeError, match="which only a model that is patched"):
        torch.nn.Embedding(40, 2)(ids)


def test_pairs_share_prompts_and_keep_their_order():
    pairs = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [20], "rejected_ids": [21]},
        {"prompt_ids": [8], "chosen_ids": [22], "rejected_ids": [23]},
    ]
    batch = DataCollatorForPreference(share_prompts=True)(pairs)
    tokens = unpack(batch["input_ids"], batch["packed_sequences"], with_prompts=True)
    assert [each.tolist() for each in tokens] == [[5, 6, 7, 20], [8, 22], [5, 6, 7, 21], [8, 23]]
    assert batch["packed_sequences"].lengths == (2, 2, 2, 2, 2)


def test_completions_after_a_template_are_shared_too():
    rows = [{"input_ids": [5, 6, 7, 90, *answer]} for answer in ([1], [2, 3])]
    batch = DataCollatorForCompletionOnlyLM([90], padding_free=True, share_prefixes=True)(rows)
    assert batch["packed_sequences"].lengths == (3, 2, 3)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"return_seq_idx": True}, [], "return_seq_idx=True gives each token the number of its example"),
        ({"token_fields": ["position_ids"]}, [], "counts positions itself"),
        ({"return_tensors": "np"}, [example([5], [6])], "makes tensors for a patched model"),
        ({}, [{"input_ids": [5, 6]}], "no example has labels"),
        ({}, [{**example([5], [6]), "packed_sequences": PackedSequences.from_lengths([1, 1], prefixes=[-1, 0])}],
         "can't be part of another row"),
    ],
)  # fmt: skip
def test_what_can_not_be_shared_is_an_error(options, rows, message):
    with pytest.raises(PadfreeError, match=message):
        collated(rows, **options)


def test_pairs_without_a_prompt_have_none_to_share():
    collate = DataCollatorForPreference(share_prompts=True)
    with pytest.raises(PadfreeError, match="pair 0 of 1 has no prompt_ids"):
        collate([{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}])
    with pytest.raises(PadfreeError, match="choose a negative one"):
        DataCollatorForPreference(share_prompts=True, ignore_index=0)
