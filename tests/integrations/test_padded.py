"""A padded batch computed as one packed row gives what the padded batch gives: the unpatched model is the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

from helpers.comparison import gradients_apart
from padfree_patch import PadfreeError, apply, restore
from padfree_patch.integrations.padded import pack_padded
from padfree_patch.registry import registry
from padfree_patch.testing import examples, pack, tiny_model

pytestmark = pytest.mark.versions

TOKENS = torch.arange(3, 30).view(3, 9) % 23 + 3
RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
LEFT = RIGHT.flip(1)  # where upstream predicts a text's first token from padding
EMPTY_ROW = torch.tensor([[1] * 9, [0] * 9, [1] * 6 + [0] * 3])


@pytest.fixture
def lengths_seen():
    """How many rows and tokens the layers of a model were given."""
    seen = []

    def watch(model):
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
        layer.register_forward_hook(lambda _, args, output: seen.append(tuple(args[0].shape[:2])))
        return seen

    return watch


def padded_call(model, mask, **more):
    labels = TOKENS.masked_fill(mask.cumsum(1) < 2, -100).masked_fill(mask == 0, -100)  # no first label: see LEFT
    return model(input_ids=TOKENS, attention_mask=mask, labels=labels, **{"use_cache": False, **more})


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("name", ["llama", "falcon", "mixtral"])
def test_outputs_and_gradients_are_those_of_the_padded_batch(name, mask, lengths_seen):
    model = tiny_model(registry().get(name), "eager")
    more = {"output_router_logits": True} if name == "mixtral" else {"output_hidden_states": True}
    alone = copy.deepcopy(model)
    expected = padded_call(alone, mask, **more)
    expected.loss.backward()
    pack_padded(apply(model))
    seen = lengths_seen(model)
    found = padded_call(model, mask, **more)
    found.loss.backward()
    assert set(seen) == {(1, 19)}
    real = mask[..., None]
    torch.testing.assert_close(found.logits * real, expected.logits * real, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=2e-5)  # with the routers' loss
    assert gradients_apart(gradients(model), gradients(alone)) < 2e-4
    if name == "llama":
        hidden = [each * real for each in found.hidden_states]
        torch.testing.assert_close(hidden, [each * real for each in expected.hidden_states], rtol=0, atol=2e-5)
    assert not found.logits[~mask.bool()].any() or name == "falcon"


def test_rewards_are_pooled_from_each_row(lengths_seen):
    """A head that refuses packed rows, and a row without a token."""
    config = copy.deepcopy(tiny_model(registry().get("llama"), "sdpa").config)
    config.pad_token_id, config.num_labels = 0, 1
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    tokens = TOKENS * RIGHT
    expected = model(input_ids=tokens, attention_mask=RIGHT).logits
    pack_padded(apply(model))
    seen = lengths_seen(model)
    torch.testing.assert_close(model(input_ids=tokens, attention_mask=RIGHT).logits, expected, rtol=0, atol=2e-5)
    found = model(input_ids=TOKENS * EMPTY_ROW, attention_mask=EMPTY_ROW).logits
    assert seen == [(1, 19), (1, 15)] and found.shape == (3, 1)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=2e-5)


@pytest.fixture
def model():
    return tiny_model(registry().get("llama"), "sdpa")


def test_everything_else_goes_on_as_it_is(model, lengths_seen):
    """Packed rows, batches without padding, holes in a mask, caches, generation, and a model that was restored."""
    alone = copy.deepcopy(model)
    apply(model)
    row = pack(examples((5, 4)))
    of_row = model(**row).logits
    hole = RIGHT.clone()
    hole[0, 3] = 0
    with pack_padded(model) as handle:
        assert torch.equal(model(**row).logits, of_row)
        seen = lengths_seen(model)
        for mask, more in ((torch.ones_like(RIGHT), {}), (hole, {}), (RIGHT, {"use_cache": True})):
            assert torch.equal(padded_call(model, mask, **more).logits, padded_call(alone, mask, **more).logits)
        prompt = {"input_ids": TOKENS, "attention_mask": LEFT, "max_new_tokens": 2, "pad_token_id": 0}
        assert torch.equal(model.generate(**prompt, do_sample=False), alone.generate(**prompt, do_sample=False))
        assert all(rows == 3 for rows, _ in seen)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(alone_with_hooks(alone)))):
            watched = lengths_seen(copied)
            del watched[:]
            padded_call(copied, RIGHT)
            assert watched[0] == (1, 19)
        restore(model)
        assert torch.equal(padded_call(model, RIGHT).logits, padded_call(alone, RIGHT).logits)
    apply(model)
    del seen[:]
    handle.remove()
    padded_call(model, RIGHT)
    assert seen == [(3, 9)]


def alone_with_hooks(model):
    twin = apply(copy.deepcopy(model))
    pack_padded(twin)
    return twin


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_positions_of_the_caller(model, reentrant):
    alone = copy.deepcopy(model)
    positions = {"position_ids": torch.arange(9)[None]}
    padded_call(alone, RIGHT, **positions).loss.backward()
    pack_padded(apply(model))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    padded_call(model, RIGHT, **positions).loss.backward()
    assert gradients_apart(gradients(model), gradients(alone)) < 2e-4


def test_who_watches_the_decoder_sees_the_row(model):
    """As the door does, which says of padded runs what to switch on."""
    seen = []
    apply(model).model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    pack_padded(model)
    padded_call(model, RIGHT)
    assert seen[0]["input_ids"].shape == (1, 19) and seen[0]["packed_sequences"].lengths == (9, 4, 6)


def test_errors(model):
    with pytest.raises(
        PadfreeError, match=r"LlamaForCausalLM is not patched; call padfree_patch.apply\(model\) before"
    ):
        pack_padded(model)
    both = torch.nn.ModuleList([apply(model), apply(copy.deepcopy(model))])
    with pytest.raises(PadfreeError, match=r"several decoders \(LlamaModel, LlamaModel\)"):
        pack_padded(both)
    handle = pack_padded(model)
    pack_padded(model)  # once
    with pytest.raises(PadfreeError, match="output_attentions of a packed batch"):
        padded_call(model, RIGHT, output_attentions=True)
    assert padded_call(model, RIGHT).logits.shape == (3, 9, model.config.vocab_size)
    handle.remove()
