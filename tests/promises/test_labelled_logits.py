"""Promise 1: with logits of labelled tokens only, and in chunks of them, loss and gradients are each example's alone.

`test_loss_and_gradients_are_those_of_each_example_alone` takes every patch. On versions that run marked tests only, the
machinery's architectures stand for all, with one whose logits are scaled and one with experts.
"""

from __future__ import annotations

import functools

import pytest
import torch

from helpers.labelled import assert_same_step, rows_of_logits, training_step
from helpers.models import PATCHES, skip_if_unavailable
from padfree_patch import DataCollatorWithFlattening, PadfreeError, apply, versions
from padfree_patch.registry import registry
from padfree_patch.testing import (
    LargestTensor,
    SyncCounter,
    checkpointing,
    conformance,
    examples,
    pack,
    pad,
    tiny_model,
)

MARKED = ("llama", "granite", "mixtral")
SEQUENCES = examples(conformance.LENGTHS)
LABELS = torch.cat(conformance.completions(SEQUENCES), dim=1)
IMPLEMENTATION = "sdpa" if versions.transformers(">=4.36") else "eager"
PREDICTED = 11
"""Labels that a token predicts: of prompts of 3, 5, 0 and 7 of 5, 9, 1 and 12 tokens; the one token is a first one."""


@pytest.fixture
def batch():
    return pack(SEQUENCES) | {"labels": LABELS}


def maker(name="llama", implementation=IMPLEMENTATION, **config):
    def make():
        return tiny_model(registry().get(name), implementation, **config)

    return make


def marked(patch):
    return pytest.param(patch, id=patch.model_type, marks=[pytest.mark.versions] * (patch.model_type in MARKED))


@pytest.mark.parametrize("patch", [marked(each) for each in PATCHES])
def test_loss_and_gradients_are_those_of_each_example_alone(patch):
    make = maker(patch.model_type)
    skip_if_unavailable(make)
    output = conformance.check_labelled_logits(make)
    assert output.logits.shape[:2] == (1, PREDICTED + 1)
    assert conformance.check_labelled_logits(make, logits="chunked", chunk=4).logits is None


def test_padded_and_plain_batches_compute_labelled_logits_too(logits):
    make = maker()
    padded = pad(SEQUENCES)
    padded["labels"][:, :4] = -100
    plain = {"input_ids": padded["input_ids"], "labels": padded["labels"]}  # nothing but tokens and labels
    for batch in (padded, plain):
        expected = training_step(make(), batch)
        found = training_step(apply(make(), logits=logits), batch)
        assert_same_step(found, expected)
        assert expected[2].logits.shape[:2] == (4, 12)
        shape = None if found[2].logits is None else tuple(found[2].logits.shape[:2])
        assert shape == (None if logits == "chunked" else (1, 14 + 1))


def test_all_logits_are_computed_where_somebody_may_need_them(logits, batch):
    """In eval mode, without gradients or labels, for a loss of one's own, and by default."""
    model = apply(maker()(), logits=logits).train()
    tokens = batch["input_ids"].shape[1]
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**without_labels).logits.shape[1] == tokens
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == tokens
    assert model.eval()(**batch).logits.shape[1] == tokens
    assert apply(model.train())(**batch).logits.shape[1] == tokens


@pytest.mark.versions
def test_a_loss_of_ones_own_gets_all_logits(logits, batch):
    if versions.transformers("<4.48"):
        pytest.skip("this version's models have no loss_function, or none that can be set")
    model = apply(maker()(), logits=logits).train()
    seen = []

    def weighted(logits, labels, vocab_size, **_):
        seen.append((tuple(logits.shape), tuple(labels.shape)))
        return logits.square().mean()

    for loss in (weighted, functools.partial(weighted)):
        model.loss_function = loss
        model(**batch)
    assert seen == [((1, 27, 97), (1, 27))] * 2


@pytest.mark.versions
def test_tuples_are_served(logits, batch):
    make = maker()
    expected = training_step(apply(make()), batch, return_dict=False)
    assert_same_step(training_step(apply(make(), logits=logits), batch, return_dict=False), expected)


@pytest.mark.versions
@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_num_items_in_batch_divides_the_sum(logits, batch, items):
    if versions.transformers("<4.46"):
        pytest.skip("this version's models do not know num_items_in_batch")
    make = maker()
    expected = training_step(apply(make()), batch, num_items_in_batch=items)
    plain = training_step(apply(make()), batch)[0]
    assert expected[0] == pytest.approx(plain * PREDICTED / 7)  # it is divided by what was given, not by the labels
    assert_same_step(training_step(apply(make(), logits=logits), batch, num_items_in_batch=items), expected)


@pytest.mark.versions
def test_shifted_labels_win_where_the_version_knows_them(logits, batch):
    if versions.transformers("<4.57"):
        pytest.skip("this version's losses know no shift_labels")
    make = maker()
    shifted = torch.cat([batch["input_ids"][:, 1:], torch.full((1, 1), -100)], 1)
    expected = training_step(apply(make()), batch, shift_labels=shifted)
    found = training_step(apply(make(), logits=logits), batch, shift_labels=shifted)
    assert_same_step(found, expected)
    assert abs(expected[0] - training_step(apply(make()), batch)[0]) > 1e-5  # more tokens have a label there


@pytest.mark.versions
@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
@pytest.mark.parametrize("items", [None, 7])
def test_router_losses_are_counted_once(logits, batch, name, items):
    make = maker(name, initializer_range=0.2)
    skip_if_unavailable(make)
    more = {"output_router_logits": True}
    if items and versions.transformers(">=4.48"):  # DBRX of 4.47 takes none
        more["num_items_in_batch"] = items
    expected = training_step(apply(make()), batch, **more)
    assert_same_step(training_step(apply(make(), logits=logits), batch, **more), expected)
    del more["output_router_logits"]
    assert abs(training_step(apply(make()), batch, **more)[0] - expected[0]) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(logits, reentrant):
    prepare = checkpointing(reentrant=reentrant)
    conformance.check_labelled_logits(maker(), logits=logits, chunk=4, prepare=prepare)


def test_tied_weights_and_several_rows_are_served(logits):
    make = maker(tie_word_embeddings=True)
    rows = [pack(SEQUENCES), pack(list(reversed(SEQUENCES)))]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 3:9] = -100
    assert_same_step(training_step(apply(make(), logits=logits), batch), training_step(apply(make()), batch))


def test_no_label_at_all_gives_what_upstream_gives(logits, batch):
    batch["labels"] = torch.full_like(LABELS, -100)
    expected = training_step(apply(maker()()), batch)
    found = training_step(apply(maker()(), logits=logits), batch)
    assert str(found[0]) == str(expected[0]) == "nan"
    assert rows_of_logits(found[2]) <= 1 < rows_of_logits(expected[2])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_half_precision_is_no_worse_than_with_all_logits(logits, batch):
    """Bound: the error with all logits against float64, with a factor for the luck of rounding."""
    exact = training_step(apply(maker()().double()), batch)

    def error(chosen):
        with torch.autocast("cpu", torch.bfloat16):
            found = training_step(apply(maker()(), logits=chosen), batch)
        assert (rows_of_logits(found[2]) < LABELS.numel()) == (chosen != "all")
        return sum((found[1][name] - gradient).norm() for name, gradient in exact[1].items())

    assert error(logits) < 1.5 * error("all")


@pytest.mark.versions
def test_the_collators_rows_cost_no_sync(logits):
    """Without them, it is one: which tokens have a label is read back."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    ends = [[-100] * (len(each[0]) * 3 // 5) + each[0].tolist()[len(each[0]) * 3 // 5 :] for each in SEQUENCES]
    batch = collator([{"input_ids": ids[0].tolist(), "labels": end} for ids, end in zip(SEQUENCES, ends)])
    model = apply(maker()(), logits=logits).train()
    expected = training_step(apply(maker()()), pack(SEQUENCES) | {"labels": LABELS})
    assert_same_step(training_step(model, batch), expected)
    with SyncCounter() as syncs:
        model(**batch)
    assert syncs.total == 0, syncs.by_name
    del batch["labelled_rows"]
    with SyncCounter() as syncs:
        model(**batch)
    assert syncs.by_name == {"nonzero": 1}


def test_labels_that_the_collator_did_not_know_are_an_error(logits):
    """And are not left out in silence. Labels that are taken out are no error."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]} for _ in range(3)])
    model = apply(maker()(), logits=logits).train()
    fewer = batch["labels"].clone()
    fewer[:, 2] = fewer[:, 8:] = -100
    expected = training_step(apply(maker()()), {**batch, "labels": fewer})
    assert_same_step(training_step(model, {**batch, "labels": fewer}), expected)
    batch["labels"][:, 1] = 6
    with pytest.raises(PadfreeError, match="labelled_rows are not those of its labels"):
        model(**batch)
    cut = {name: batch[name][:, :8] for name in ("input_ids", "position_ids", "labels")}
    with pytest.raises(PadfreeError, match=r"labelled_rows are not those .*of 12 tokens, the labels have 8"):
        model(**cut, labelled_rows=batch["labelled_rows"])
    with pytest.raises(PadfreeError, match="labelled_rows must be what a collator of ours makes, found Tensor"):
        model(**cut, labelled_rows=torch.tensor([1]))


def test_no_tensor_of_all_logits_is_made_in_chunks():
    make = maker(vocab_size=1024, num_hidden_layers=1, hidden_size=24, num_attention_heads=2, intermediate_size=32)
    batch = pack(examples([64] * 40))
    batch["labels"] = batch["input_ids"]
    elements = {}
    for chosen in ("all", "chunked"):
        model = apply(make(), logits=chosen, verify=False)
        with LargestTensor() as largest:
            training_step(model, batch)
        elements[chosen] = largest.elements
    assert elements["chunked"] <= 1025 * 1024 < 2520 * 1024 <= elements["all"]
