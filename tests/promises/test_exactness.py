"""Promise 1: a packed row gives what each example gives alone, on eager and sdpa.

Every architecture, its variants and flash_attention_2 are in the matrix (`nox -s eras`, `nox -s matrix`). It makes the
same checks, so `test_patched_model_passes` takes some, where their code differs, and has no mark `versions`.
"""

from __future__ import annotations

import pytest
import torch

from helpers.models import DIFFERENT, PATCHES, skip_if_unavailable
from padfree_patch import applied, versions
from padfree_patch.registry import registry
from padfree_patch.testing import CHECKS, FAIL_UNPATCHED, checkpointing, conformance, examples, pack, pad, tiny_model

ROUTED = [patch for patch in PATCHES if patch.model_type in ("dbrx", "mixtral", "qwen2_moe")]


def _id(value) -> str:
    return getattr(value, "model_type", None) or getattr(value, "__name__", None) or str(value).replace(" ", "-")


@pytest.mark.parametrize("patch", DIFFERENT, ids=_id)
@pytest.mark.parametrize("check", CHECKS, ids=_id)
def test_patched_model_passes(check, patch, implementation):
    def make():
        return tiny_model(patch, implementation)

    skip_if_unavailable(make)
    check(make)


@pytest.mark.versions
@pytest.mark.parametrize("check", FAIL_UNPATCHED, ids=_id)
def test_unpatched_model_fails(check, make):
    with pytest.raises(AssertionError):
        check(make, patched=False)


@pytest.mark.versions
@pytest.mark.parametrize("patch", ROUTED, ids=_id)
def test_router_losses_are_the_padded_batchs(patch, implementation):
    def make():
        # Random DBRX is nearly blind to other tokens; with larger weights a leak shows.
        return tiny_model(patch, implementation, initializer_range=0.2)

    skip_if_unavailable(make)
    conformance.check_router_losses(make)
    with pytest.raises(AssertionError):
        conformance.check_router_losses(make, patched=False)


@pytest.mark.versions
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradients_survive_checkpointing(make, reentrant):
    conformance.check_gradients(make, prepare=checkpointing(reentrant=reentrant))


@pytest.mark.versions
def test_loss_is_the_padded_batchs(make):
    sequences = examples((5, 9, 1, 12))
    with torch.no_grad():
        expected = make()(**pad(sequences)).loss
        with applied(make()) as model:
            batch = pack(sequences)
            torch.testing.assert_close(model(**batch, labels=batch["input_ids"]).loss, expected)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_no_worse_than_upstreams(make, dtype):
    """Bound: upstream's own error against float32, alone, with a factor for the luck of rounding."""
    sequences = examples((5, 9, 12))
    exact = conformance.logits_alone(make, sequences)
    upstream = conformance.logits_alone(lambda: make().to(dtype), sequences)
    with applied(make().to(dtype)) as model, torch.no_grad():
        packed = model(**pack(sequences)).logits
    assert (packed.float() - exact).norm() < 1.5 * (upstream.float() - exact).norm()


@pytest.mark.versions
def test_example_that_starts_at_position_3_has_the_same_logits(make):
    """Rope sees differences of positions only: an example that starts at 3 has the logits of one that starts at 0."""
    sequences = examples((5, 9))
    batch = pack(sequences)
    batch["position_ids"][:, :5] += 3
    alone = conformance.logits_alone(make, sequences)
    with applied(make()) as model, torch.no_grad():
        packed = model(**batch).logits
    assert conformance.largest(packed - alone) < conformance.LOGIT_TOLERANCE * conformance.largest(alone)


@pytest.mark.versions
def test_dropout_is_isolated_and_random(make):
    """In train mode the attention weights are dropped at random, but B still does not depend on A."""
    model = make(attention_dropout=0.5).train()
    a, b = examples((9, 8))
    (other_a,) = examples((9,), seed=2)
    if not getattr(model.config, "attention_dropout", 0):
        pytest.skip("this version of the architecture has no attention dropout")

    def run(first):
        torch.manual_seed(0)
        return model(**pack([first, b])).logits[:, 9:]

    with applied(model), torch.no_grad():
        assert torch.equal(run(a), run(other_a))
        torch.manual_seed(1)
        assert not torch.equal(run(a), model(**pack([a, b])).logits[:, 9:])


@pytest.mark.versions
def test_no_dropout_where_upstream_applies_none(implementation):
    """Falcon with rotary drops nothing on eager and sdpa, whatever its config says; with ALiBi it does."""

    def make(**config):
        return tiny_model(registry().get("falcon"), implementation, attention_dropout=0.5, **config).train()

    skip_if_unavailable(make)
    sequences = examples((5, 9))
    alone = conformance.logits_alone(make, sequences)
    with applied(make()) as model, torch.no_grad():
        assert conformance.largest(model(**pack(sequences)).logits - alone) < 1e-5
    with applied(make(alibi=True)) as model, torch.no_grad():
        assert not torch.equal(model(**pack(sequences)).logits, model(**pack(sequences)).logits)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_boundaries_are_ignored_whatever_the_labels_say(make, name):
    if name == "shift_labels" and versions.transformers("<4.57"):
        pytest.skip("this version's losses know no shift_labels")
    sequences = examples((5, 9))
    loss, _ = conformance.alone_loss_and_gradients(make, sequences)
    batch = pack(sequences)
    labels = batch["input_ids"]
    extra = {"labels": labels}
    if name == "shift_labels":
        extra["shift_labels"] = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)
    with applied(make()) as model, torch.no_grad():
        torch.testing.assert_close(model(**batch, **extra).loss.item(), loss, rtol=2e-6, atol=0)


@pytest.mark.versions
def test_generation_from_left_padded_prompts_with_a_static_cache_is_unchanged(make):
    """generate then passes a 4-D mask beside positions such as 1, 1, 0, 1: ordinary."""
    if versions.transformers("<4.45"):
        pytest.skip("this version's generate has no static cache for these calls")
    short, long = examples((6, 10))
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1), long])
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    model = make()
    try:
        expected = model.generate(ids, attention_mask=mask, **options)
    except Exception as error:
        pytest.skip(f"upstream itself can't: {error!r}")
    with applied(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
