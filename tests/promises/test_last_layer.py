"""Promise 1: with logits of labelled tokens only, the last layer computes what they need, and nobody can tell.

That loss and gradients are each example's alone is checked of every patch in test_labelled_logits.py, where the last
layer is narrowed too. Who may look at its other tokens, test_last_layer_readers.py asks.
"""

from __future__ import annotations

import re
import threading

import pytest
import torch

from helpers.labelled import assert_same_step, training_step
from helpers.last_layer import (
    PREDICTED,
    SEQUENCES,
    TOKENS,
    Rows,
    is_narrowed,
    make,
    packed_batch,
    rows_of_down_projections,
)
from padfree_patch import apply, versions
from padfree_patch.registry import registry
from padfree_patch.testing import checkpointing


@pytest.fixture
def batch():
    return packed_batch()


HERE = versions.transformers_version()
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "stablelm", "olmo", "cohere2", "glm4")


def is_here(name):
    """Whether this version has the architecture, and its patch says all."""
    patch = registry().get(name)
    return versions.inside(HERE, patch.transformers) and not patch.any_decoder


@pytest.mark.versions
@pytest.mark.parametrize("name", [*filter(is_here, DENSE)])
def test_dense_models_run_the_last_layers_mlp_on_labelled_tokens(name, batch):
    assert is_narrowed(apply(make(name, "eager"), logits="labelled"), batch)
    assert not is_narrowed(apply(make(name, "eager")), batch)


def test_the_projection_of_attention_runs_on_them_too(batch):
    model = apply(make(hidden_size=48, num_attention_heads=4, head_dim=20, num_key_value_heads=2), logits="labelled")
    if model.model.layers[0].self_attn.o_proj.in_features != 80:
        pytest.skip("heads have no size of their own in this version")
    with Rows(80) as rows:
        model.train()(**batch)
    assert rows.found == [TOKENS] * (len(model.model.layers) - 1) + [PREDICTED]


@pytest.mark.versions
def test_padded_batches_profit_too(logits):
    model = apply(make(), logits=logits)
    ids = torch.randint(3, 90, (3, TOKENS // 3))
    labels = ids.masked_fill(torch.arange(TOKENS // 3) < 4, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert rows_of_down_projections(model, batch)[-1] == 15
    assert_same_step(training_step(model, batch), training_step(apply(make()), batch))


def test_all_labelled_stays_whole(batch):
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :2] = -100
    assert not is_narrowed(apply(make(), logits="labelled"), batch)


def test_hooks_elsewhere_change_nothing(batch):
    model = apply(make(), logits="labelled")
    for module in (model.model.embed_tokens, model.model.layers[0].mlp, model.lm_head):
        module.register_forward_hook(lambda module, args, output: None)
    assert is_narrowed(model, batch)


@pytest.mark.versions
@pytest.mark.parametrize("where", ["argument", "config"])
def test_hidden_states_that_are_asked_for_are_whole(where, batch):
    expected = training_step(apply(make()), batch, output_hidden_states=True)
    model, more = apply(make(), logits="labelled"), {"output_hidden_states": True}
    if where == "config":
        model.config.output_hidden_states, more = True, {}
    found = training_step(model, batch, **more)
    assert_same_step(found, expected)
    for mine, alls in zip(found[2].hidden_states, expected[2].hidden_states):
        torch.testing.assert_close(mine, alls, rtol=1e-5, atol=1e-6)
    assert found[2].hidden_states[-1].shape[1] == TOKENS


@pytest.mark.versions
def test_router_losses_are_of_all_tokens(batch):
    if not versions.transformers(">=4.38"):
        pytest.skip("no Mixtral whose router loss is right in this version")
    model = apply(make("mixtral"), logits="labelled")
    expected = training_step(apply(make("mixtral")), batch, output_router_logits=True)
    found = training_step(model, batch, output_router_logits=True)
    assert_same_step(found, expected)
    for mine, alls in zip(found[2].router_logits, expected[2].router_logits):
        torch.testing.assert_close(mine, alls, rtol=1e-5, atol=1e-6)


@pytest.mark.versions
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_layers_that_run_again_stay_whole(batch, logits, reentrant):
    expected = training_step(apply(make()), batch)
    model = apply(make(), logits=logits)
    checkpointing(reentrant=reentrant)(model)
    assert not is_narrowed(model, batch)
    assert_same_step(training_step(model, batch), expected)


def test_nothing_is_left_behind(batch, logits):
    model = apply(make(), logits=logits)
    training_step(model, batch)
    last = model.model.layers[-1]

    def fails(*args, **kwargs):
        raise RuntimeError("upstream's own")

    last.mlp.act_fn.forward = fails
    with pytest.raises(RuntimeError, match=re.escape("upstream's own")):
        model(**batch)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_another_thread_finds_all_tokens(batch):
    """Which calls the same model while a training step of this one runs."""
    model = apply(make(), logits="labelled").train()
    with torch.no_grad():
        alone = model(input_ids=SEQUENCES[1]).logits
    seen = []

    def elsewhere(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(call()))
            thread.start()
            thread.join()

    def call():
        with torch.no_grad():
            return model(input_ids=SEQUENCES[1]).logits

    model.model.layers[0].register_forward_pre_hook(elsewhere)
    assert is_narrowed(model, batch)
    torch.testing.assert_close(seen[0], alone, rtol=1e-5, atol=1e-6)


def test_autocast_is_served(batch):
    model = apply(make(), logits="labelled")
    with torch.autocast("cpu", torch.bfloat16):
        assert is_narrowed(model, batch)
        found = training_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = training_step(apply(make()), batch)
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 0.02, f"{name} is off by {error:.2e}"  # bfloat16 has 8 bits: 0.004 of a rounding, a few of them
