"""DataCollatorForCompletionOnlyLM: what is trained on, padded and flattened."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from padfree_patch import DataCollatorForCompletionOnlyLM, PadfreeError, apply
from padfree_patch.testing import SyncCounter, examples

pytestmark = pytest.mark.versions


class Tokenizer:
    """One token per character, its code point; pads with its own end token, as many do."""

    pad_token_id = eos_token_id = ord("$")
    padding_side = "right"

    def encode(self, text, add_special_tokens=True):
        return [ord(character) for character in text]


def completion_labels(text, batch_row):
    """What is trained on: the text with a dot for every ignored label."""
    return "".join("." if label == -100 else chr(label) for label in batch_row.tolist())


def collate(texts, **options):
    options = {"response_template": "A:", "tokenizer": Tokenizer(), **options}
    features = [{"input_ids": Tokenizer().encode(text)} for text in texts]
    return DataCollatorForCompletionOnlyLM(**options)(features)


@pytest.mark.parametrize(
    ("text", "options", "trained"),
    [
        ("Q:oneA:two$", {}, ".......two$"),
        ("Q:oneA:two$", {"response_template": [ord("A"), ord(":")]}, ".......two$"),
        ("A:noA:two$", {}, "......two$"),  # the last one counts, as in TRL
        ("Q:1A:23Q:4A:56$", {"instruction_template": "Q:"}, ".....23.....56$"),
        ("Q:1A:23Q:45", {"instruction_template": "Q:"}, ".....23...."),  # a turn without an answer
        ("hi A:23Q:4A:5$", {"instruction_template": "Q:"}, ".....23.....5$"),  # begins without an instruction
        ("Q:1A:23U:4A:56$", {"instruction_template": ["Q:", "U:"]}, ".....23.....56$"),
        ("Q:1A:23Q:4B:56$", {"instruction_template": "Q:", "response_template": ["A:", "B:"]}, ".....23.....56$"),
        ("Q:1A:23Q:4A:56$", {"instruction_template": [[ord("U")], [ord("Q"), ord(":")]]}, ".....23.....56$"),
    ],
)
def test_completion_only_labels(text, options, trained):
    padded = collate([text, "Q:A:x$"], **options)
    assert completion_labels(text, padded["labels"][0]).rstrip(".") == trained.rstrip(".")
    flat = collate([text, "Q:A:x$"], **options, padding_free=True)
    assert completion_labels(text, flat["labels"][0]) == trained + "....x$"


def test_completion_only_pads_or_flattens():
    texts = ["Q:A:xyz$", "Q:A:x$"]
    padded = collate(texts)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 8)
    assert padded["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert padded["labels"][1].tolist() == [-100] * 4 + [ord("x"), ord("$"), -100, -100]  # eos stays, pad does not
    flat = collate(texts, padding_free=True, return_flash_attn_kwargs=True)
    assert flat["position_ids"].tolist() == [[*range(8), *range(6)]]
    assert flat["cu_seq_lens_q"].tolist() == [0, 8, 14]
    assert "attention_mask" not in flat


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("Q:one", {}, r"example 1 of 2 has no response template \(\[65, 58\]\) in its 5 tokens"),
        ("oneA:two", {"instruction_template": "Q:"}, r"example 1 of 2 has no instruction template \(\[81, 58\]\)"),
    ],
)
def test_missing_template_is_loud(text, options, message):
    with pytest.raises(PadfreeError, match=message):
        collate(["Q:A:x", text], **options)


def test_lengths_have_trls_shapes():
    """Those of TRL 0.13 to 0.19, which people's code reads; `return_flash_attn_kwargs` asks for transformers'."""
    flat = collate(["Q:A:xyz$", "Q:A:x$"], padding_free=True)
    for end in "qk":
        assert flat[f"cu_seq_lens_{end}"].tolist() == [[0, 8, 14]]
        assert flat[f"cu_seq_lens_{end}"].dtype == torch.int32
        assert flat[f"max_length_{end}"].tolist() == [8]
    assert flat["packed_sequences"].lengths == (8, 6)
    assert set(collate(["A:x"], padding_free=True, return_flash_attn_kwargs=False)) == {
        "input_ids",
        "labels",
        "position_ids",
    }


def test_lengths_of_trls_shapes_pass_through_a_patched_model(llama):
    sequences = examples((5, 9, 1))
    collator = DataCollatorForCompletionOnlyLM([7], padding_free=True)
    batch = collator([{"input_ids": [7, *each[0].tolist()]} for each in sequences])
    with torch.no_grad():
        alone = torch.cat([llama(input_ids=ids).logits for ids in batch["input_ids"].split([6, 10, 2], dim=1)], dim=1)
        apply(llama)
        with SyncCounter() as syncs:
            packed = llama(**batch).logits
        assert syncs.total == 0
        torch.testing.assert_close(packed, alone)
        assert not torch.allclose(llama(input_ids=batch["input_ids"]).logits, alone)  # the control


@pytest.mark.parametrize("padding_free", [False, True])
def test_an_example_may_be_its_tokens_alone(padding_free):
    ids = [[5, 7, 6], [5, 5, 7, 6, 9]]
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    collator = DataCollatorForCompletionOnlyLM([7], tokenizer=tokenizer, padding_free=padding_free)
    expected = collator([{"input_ids": each} for each in ids])
    for features in (ids, [torch.tensor(each) for each in ids], iter(ids)):
        found = collator(features)
        if padding_free:
            assert found.pop("packed_sequences") == expected["packed_sequences"]
            assert torch.equal(found.pop("labelled_rows").rows, expected["labelled_rows"].rows)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_subclass_extends_torch_call():
    class Marked(DataCollatorForCompletionOnlyLM):
        def torch_call(self, examples):
            return {**super().torch_call(examples), "mark": 1}

    assert Marked([7], padding_free=True)([{"input_ids": [1, 7, 3]}])["mark"] == 1
    arrays = DataCollatorForCompletionOnlyLM([7], padding_free=True)([[1, 7, 3]], return_tensors="np")
    assert arrays["labels"].tolist() == [[-100, -100, 3]] and isinstance(arrays["max_length_q"], np.ndarray)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_masks_of_trl_narrow_what_is_trained(padding_free, name):
    row = {"input_ids": [1, 7, 3, 4, 5]}
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    collator = DataCollatorForCompletionOnlyLM([7], tokenizer=tokenizer, padding_free=padding_free, ignore_index=-1)
    assert collator([row])["labels"].tolist() == [[-1, -1, 3, 4, 5]]  # the control
    assert collator([{**row, name: [1, 1, 1, 0, 1]}])["labels"].tolist() == [[-1, -1, 3, -1, 5]]
    with pytest.raises(PadfreeError, match=f"example 0 has 5 tokens, but 1 values in its {name}"):
        collator([{**row, name: [1]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm": True}, "mlm"),
        ({"response_template": ""}, "is empty"),
        ({"response_template": ["A:", ""]}, "is empty"),
        ({"response_template": 7}, "response_template must be text, token ids or a list of either, found int"),
        ({"response_template": [7, None]}, "response_template must be whole numbers, found None at place 1"),
        ({"instruction_template": [1.5]}, "instruction_template must be whole numbers, found 1.5"),
    ],
)
def test_completion_only_refuses_nonsense(options, message):
    with pytest.raises(PadfreeError, match=message):
        collate(["Q:A:x"], **options)


@pytest.mark.parametrize("boundaries", [{"seq_lengths": [4, 3]}, {"position_ids": [0, 1, 2, 3, 0, 1, 2]}], ids=str)
def test_completions_of_every_example_in_a_packed_row(boundaries):
    row = {"input_ids": [5, 90, 6, 7, 8, 90, 9], "weight": [1.0] * 7, **boundaries}
    collator = DataCollatorForCompletionOnlyLM(
        [90], padding_free=True, return_flash_attn_kwargs=True, token_fields=["weight"]
    )
    batch = collator([row])
    assert batch["packed_sequences"].lengths == (4, 3)
    assert batch["labels"].tolist() == [[-100, -100, 6, 7, -100, -100, 9]]
    assert batch["weight"].shape == (1, 7)
    with pytest.raises(PadfreeError, match="example 0 is a row of 2 examples, which needs padding_free=True"):
        DataCollatorForCompletionOnlyLM([90])([row])
    with pytest.raises(PadfreeError, match="example 0 of 1 has no response template"):
        collator([{**row, "input_ids": [5, 90, 6, 7, 8, 8, 9]}])


def test_completions_in_a_row_of_a_multiple():
    batch = DataCollatorForCompletionOnlyLM([7], padding_free=True, pad_to_multiple_of=8)([{"input_ids": [1, 7, 3]}])
    assert batch["input_ids"].shape == (1, 8)
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, -100, -100, -100, -100]]


@pytest.mark.parametrize("padding_free", [True, False])
def test_fields_that_a_padded_batch_leaves_out_are_named(padding_free):
    tokenizer, row = types.SimpleNamespace(pad_token_id=0), {"input_ids": [1, 7, 3], "weight": [1.0] * 3}
    collator = DataCollatorForCompletionOnlyLM([7], tokenizer=tokenizer, padding_free=padding_free)
    with pytest.warns(
        UserWarning, match="leaves out weight: .* in token_fields=" if padding_free else "leaves out weight: choose"
    ):
        assert "weight" not in collator([row])
    collator([row])  # a second warning would be an error


def test_padding_that_is_there_already_is_not_trained():
    """Also where it is the end token."""
    end = 2
    tokenizer = types.SimpleNamespace(pad_token_id=end)
    feature = {"input_ids": [1, 7, 3, end, end, end], "attention_mask": [1, 1, 1, 1, 0, 0]}
    batch = DataCollatorForCompletionOnlyLM([7], tokenizer=tokenizer)([feature])
    assert batch["labels"].tolist() == [[-100, -100, 3, end, -100, -100]]


def test_a_completion_that_was_cut_off_is_an_error():
    with pytest.raises(PadfreeError, match="example 1 of 2 has nothing after its response template"):
        DataCollatorForCompletionOnlyLM([7], padding_free=True)([{"input_ids": [1, 7, 3]}, {"input_ids": [1, 7]}])
