"""Promises 1, 2 and 4 where examples share prompts: each gets what it gets alone, or the row is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from helpers.any_decoder import tiny_decoder
from helpers.comparison import gradients_apart
from helpers.models import PATCHES, skip_if_unavailable
from padfree_patch import (
    DataCollatorForPreference,
    DataCollatorWithFlattening,
    PackedSequences,
    PadfreeError,
    applied,
    apply,
    last_tokens,
    sequence_log_probs,
    unpack,
    verify,
)
from padfree_patch.batch.packed_batch import known_batches
from padfree_patch.registry import registry
from padfree_patch.testing import SyncCounter, Unavailable, checkpointing, conformance, tiny_model
from padfree_patch.testing.shared_prompts import check_shared_prompts, completions

SLICE = [patch for patch in PATCHES if patch.model_type in ("llama", "mistral", "falcon")]
"""On every version that runs marked tests: rotaries old and new, a window, ALiBi."""


@pytest.fixture
def shared():
    """A batch whose examples share prompts."""
    return DataCollatorWithFlattening(share_prefixes=True)(completions())


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.model_type)
def test_examples_get_what_they_get_alone(patch):
    """Loaded as eager too where upstream has no sdpa; the others in the slice below, and in own_process."""

    # With small weights, gradients of its recurrence are 1e-7 of the others': nothing but rounding.
    larger = {"initializer_range": 0.2} if patch.model_type == "qwen3_next" else {}

    def make():
        try:
            return tiny_model(patch, "sdpa", **larger)
        except Unavailable:
            return tiny_model(patch, "eager", **larger)

    skip_if_unavailable(make)
    check_shared_prompts(make)


@pytest.mark.versions
@pytest.mark.parametrize("patch", SLICE, ids=lambda patch: patch.model_type)
def test_examples_get_what_they_get_alone_on_every_version(patch, implementation):
    variant = patch.variants["alibi" if patch.model_type == "falcon" else next(iter(patch.variants))]

    def make():
        return tiny_model(patch, implementation, **variant)

    skip_if_unavailable(make)
    check_shared_prompts(make)


def test_a_row_that_lost_its_prompts_is_noticed(llama, shared):
    """The control: the same row as if its answers began with the last token of their prompt."""
    lost = PackedSequences.from_lengths(shared["packed_sequences"].lengths)
    with applied(llama) as model, torch.no_grad():
        right = model(**shared).logits
        wrong = model(input_ids=shared["input_ids"].plain(), packed_sequences=lost).logits
    assert conformance.largest(right - wrong) > 100 * conformance.LOGIT_TOLERANCE * conformance.largest(right)


@pytest.mark.versions
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputed_layers_know_the_prompts_though_no_batch_is_found_again(monkeypatch, reentrant):
    monkeypatch.setattr(known_batches, "keep", lambda key, value, held=None: value)
    check_shared_prompts(
        lambda: tiny_model(registry().get("llama"), "sdpa"), prepare=checkpointing(reentrant=reentrant)
    )


@pytest.mark.versions
def test_no_device_sync_with_the_collators_row(llama, shared):
    with applied(llama) as model, torch.no_grad():
        model(**shared)  # what is measured once per process is measured
        batch = DataCollatorWithFlattening(share_prefixes=True)(completions(seed=9))
        with SyncCounter() as syncs:
            model(**batch)
    assert syncs.total == 0


@pytest.mark.versions
def test_unpatched_models_refuse_the_row(llama, shared):
    for batch in (shared, {"input_ids": shared["input_ids"]}):
        with pytest.raises((PadfreeError, TypeError), match=r"padfree_patch.apply|packed_sequences"):
            llama(**batch)


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["rwkv", "mamba", "gpt2"])
def test_unpatched_models_that_look_at_no_mask_refuse_the_row_too(kind, shared):
    with pytest.raises((PadfreeError, TypeError), match=r"padfree_patch.apply|packed_sequences|position_ids"):
        tiny_decoder(kind)(**shared)


@pytest.mark.parametrize("kind", ["qwen3_next", "llama4_text"])
def test_models_without_a_patch_hand_the_prompt_on(kind):
    """Recurrent states, convolutions and chunks of attention of each example begin with its prompt."""
    check_shared_prompts(lambda: tiny_decoder(kind))


def test_a_patched_model_refuses_the_row_without_its_sequences(llama, shared):
    apply(llama)
    with pytest.raises(PadfreeError, match="no packed_sequences with prefixes"):
        llama(input_ids=shared["input_ids"], position_ids=shared["position_ids"])
    with pytest.raises(PadfreeError, match="leave the mask out"):
        llama(**shared, attention_mask=torch.ones_like(shared["position_ids"]))
    with pytest.raises(PadfreeError, match="position_ids and the given lengths disagree"):
        llama(
            **{
                **shared,
                "position_ids": PackedSequences.from_lengths(shared["packed_sequences"].lengths).position_ids()[None],
            }
        )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "by the length of each example"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout=0.1 of its config"),
        ("phi", {"resid_pdrop": 0.1}, "would be drawn once for a prompt"),
        ("mixtral", {"output_router_logits": True}, "the router loss .output_router_logits."),
    ],
)
def test_what_can_not_be_shared_is_refused_by_name(model_type, config, reason, shared):
    def make():
        return tiny_model(registry().get(model_type), "sdpa", **config)

    skip_if_unavailable(make)
    with applied(make().train()) as model, pytest.raises(PadfreeError, match=reason):
        model(**shared)


@pytest.mark.versions
@pytest.mark.parametrize("logits", ["labelled", "chunked"])
def test_labelled_logits_of_a_shared_row_train_alike(llama, shared, logits):
    found = []
    for kept in ("all", logits):
        model = apply(copy.deepcopy(llama).train(), logits=kept)
        with SyncCounter() as syncs:
            output = model(**shared)
        output.loss.backward()
        found.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert syncs.total == 0
    assert output.logits is None or output.logits.shape[1] < shared["input_ids"].shape[1]
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(other, loss)
    assert gradients_apart(others, gradients) <= conformance.GRADIENT_TOLERANCE


def test_verify_compares_a_shared_row_with_whole_examples(llama, shared):
    result = verify(apply(llama), shared)
    assert result.ok and result.examples == len(completions())


def test_dropout_is_none_of_evaluation(shared):
    with applied(tiny_model(registry().get("mistral"), "eager", attention_dropout=0.1)) as model, torch.no_grad():
        model(**shared)


def test_patch_that_changes_calls_must_say_that_it_knows_prompts(monkeypatch, shared):
    patch = registry().get("falcon")
    with applied(tiny_model(patch, "sdpa")) as model:
        model(**shared)
        monkeypatch.setitem(vars(patch), "attention_call_knows_prompts", False)
        with pytest.raises(PadfreeError, match="attention_call of the patch for 'falcon' does not say"):
            model(**shared)


PAIRS = [((4, 9, 3), (5, 7, 1), (6, 1)), ((8,), (3, 1), (2, 9, 9, 9, 1)), ((4, 9, 3), (9, 1), (4, 5, 1))]


def pairs():
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, each))) for each in PAIRS]


def dpo(log_probs, reference):
    chosen, rejected = (log_probs - reference).chunk(2)
    return -F.logsigmoid(0.5 * (chosen - rejected)).mean()


@pytest.mark.versions
def test_dpo_is_that_of_whole_pairs(llama):
    reference = torch.tensor([-9.0, -8, -7, -6, -5, -4])
    found = []
    for share in (True, False):
        model = copy.deepcopy(llama)
        batch = DataCollatorForPreference(share_prompts=share)(pairs())
        labels, sequences = batch.pop("labels"), batch["packed_sequences"]
        with applied(model):
            logits = model(**batch).logits
            loss = dpo(sequence_log_probs(logits, labels, sequences), reference)
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss, gradients, last_tokens(logits, sequences), batch["input_ids"].numel()))
    (loss, gradients, pooled, tokens), (expected, wanted, others, more) = found
    assert tokens == more - 3 * 2  # the first and the third pair have one prompt, of which two tokens are saved thrice
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(pooled, others, rtol=1e-4, atol=1e-5)  # of tiny models in float32
    assert gradients_apart(gradients, wanted) <= conformance.GRADIENT_TOLERANCE


def test_examples_come_back_whole_or_from_the_last_token_of_their_prompt(llama, shared):
    alone = copy.deepcopy(llama)
    with torch.no_grad(), applied(llama):
        logits = llama(**shared).logits
    sequences = shared["packed_sequences"]
    expected = [alone(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in completions()]
    for whole, part, wanted in zip(unpack(logits, sequences, with_prompts=True), unpack(logits, sequences), expected):
        torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(part, whole[-len(part) :])
    tokens = unpack(shared["input_ids"], sequences, with_prompts=True)
    assert [each.tolist() for each in tokens] == [row["input_ids"] for row in completions()]
