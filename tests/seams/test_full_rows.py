"""A patched model that is trained on nothing but full rows without boundaries says so, once."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers.training import flattening, padding, trainer_of
from padfree_patch import PackedSequences, apply
from padfree_patch.testing import pack

pytestmark = pytest.mark.versions

SAID = "10 batches that it was trained on have full rows"


def rows(tokens=12, count=2):
    return torch.randint(3, 90, (count, tokens))


def with_mask(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def with_positions(ids):
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "labels": ids}


def bare(ids):
    return {"input_ids": ids, "labels": ids}


def said(model, batches):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in batches:
            model(**batch)
    return [str(each.message) for each in found if SAID in str(each.message)]


@pytest.mark.parametrize("kind", [with_mask, with_positions, bare])
def test_full_rows_are_said_once(llama, kind):
    model = apply(llama).train()
    assert not said(model, [kind(rows()) for _ in range(9)])
    (message,) = said(model, [kind(rows()) for _ in range(30)])
    assert message.startswith("LlamaModel: ") and "docs/training.md names the packings" in message


@pytest.mark.parametrize("kind", [with_mask, bare])
def test_decoder_alone_says_it_too(llama, kind):
    model = apply(llama).model.train()
    batches = [{name: each for name, each in kind(rows()).items() if name != "labels"} for _ in range(11)]
    assert len(said(model, batches)) == 1


@pytest.mark.parametrize("first", ["packed", "padded", "segments", "4-D mask"])
def test_a_batch_that_says_where_examples_end_settles_it(llama, first):
    ids = rows()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0 if first == "padded" else 2
    batch = {
        "packed": pack([ids[:1], ids[1:, :5]]),
        "padded": {"input_ids": ids, "attention_mask": mask},
        "segments": {"input_ids": ids, "attention_mask": mask},
        "4-D mask": {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 12, 12)},
    }[first]
    if first == "4-D mask":
        batch["attention_mask"] = torch.full((2, 1, 12, 12), torch.finfo(torch.float32).min).triu(1)
    model = apply(llama).train()
    if first == "4-D mask":
        try:
            model(**batch)
        except (ValueError, RuntimeError):
            pytest.skip("this version takes no such mask")
        model = apply(llama)
    count = 4 if first == "padded" else 1
    batches = [{name: each.clone() for name, each in batch.items()} for _ in range(count)]
    assert not said(model, [*batches, *(with_mask(rows()) for _ in range(20))])


@pytest.mark.parametrize("mask", [with_mask, bare])
@pytest.mark.parametrize("part", ["head", "decoder"])
def test_rows_whose_lengths_say_that_each_is_one_text_are_not_said(llama, part, mask):
    """The control is the same rows without the lengths, above."""
    model = apply(llama).train()
    model = model if part == "head" else model.model
    lengths = {"packed_sequences": PackedSequences.from_lengths([12, 12])}
    batches = [{**mask(rows()), **lengths} for _ in range(20)]
    for batch in batches if part == "decoder" else []:
        batch.pop("labels")
    assert not said(model, batches)


def test_short_last_rows_of_an_epoch_do_not_hide_it(llama):
    ids = rows()
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([11]), 0)}
    epoch = [with_mask(rows()) for _ in range(4)]
    assert (
        len(said(apply(llama).train(), [*epoch, padded, *epoch, padded, *(with_mask(rows()) for _ in range(4))])) == 1
    )


def test_what_is_no_training_is_not_counted(llama):
    model = apply(llama).train()
    ids = rows()
    assert not said(model, [with_mask(ids)] * 30 + [bare(ids)] * 30)  # one batch again and again
    with torch.no_grad():
        assert not said(model, [with_mask(rows()) for _ in range(20)])
    assert not said(model.eval(), [with_mask(rows()) for _ in range(20)])


def test_unpatched_model_says_nothing(llama):
    """The control."""
    assert not said(llama.train(), [with_mask(rows()) for _ in range(20)])


@pytest.mark.parametrize("collator", [padding, flattening()])
def test_ordinary_trainings_say_nothing(llama, tmp_path, collator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of(apply(llama), tmp_path, collator, max_steps=12).train()
