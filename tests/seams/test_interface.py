"""The attention interface of 4.48 on: answered for packed rows of patched models, and for nothing else."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.models import assert_exact
from padfree_patch import PadfreeError, versions
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(versions.transformers("<4.48"), reason="this version has no attention interface"),
]


def mapping():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def tiny(model_type, implementation="sdpa"):
    return tiny_model(registry().get(model_type), implementation)


def test_functions_come_back_in_whatever_order_models_are_restored():
    before = dict(mapping())
    for _ in range(2):
        first, second = padfree_patch.apply(tiny("llama")), padfree_patch.apply(tiny("mistral"))
        assert dict(mapping()) != before
        padfree_patch.restore(first)
        assert_exact(
            second, pack(examples((3, 4))), conformance.logits_alone(lambda: tiny("mistral"), examples((3, 4)))
        )
        padfree_patch.restore(second)
        assert dict(mapping()) == before
        assert not getattr(mapping(), "_local_mapping", None)


def test_implementation_that_was_switched_after_apply_is_refused_in_a_packed_call(batch):
    model = padfree_patch.apply(tiny("llama"))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PadfreeError, match="LlamaModel: loaded with attention implementation 'flex_attention'"):
        model(**batch)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_subclass_that_bypasses_the_interface_is_answered_in_its_own_forward(batch, implementation):
    from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

    class OwnAttention(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def make():
        model = tiny("llama", implementation)
        for layer in model.model.layers:
            layer.self_attn.__class__ = OwnAttention
        return model

    alone = conformance.logits_alone(make, examples(conformance.LENGTHS))
    with padfree_patch.applied(make()) as model:
        assert_exact(model, batch, alone)
    with pytest.raises(AssertionError):  # the control
        assert_exact(make(), batch, alone)


@pytest.mark.parametrize("shape", [(1, 2, 5, 8), (1, 2, 2, 5, 8)], ids=str)
def test_calls_of_others_go_straight_through(shape):
    """Of modules that nobody has patched, also with tensors of five dimensions, or the errors of upstream for them."""

    class Other(torch.nn.Module):
        num_key_value_groups, is_causal = 1, False

    q = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(*(1,) * (len(shape) - 2), 5, 5)

    def outcome():
        try:
            return mapping()["sdpa"](Other(), q, q, q, mask)[0]
        except (ValueError, RuntimeError) as error:
            return str(error)

    expected = outcome()
    with padfree_patch.applied(tiny("llama")):
        found = outcome()
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


@pytest.mark.parametrize("special", ["s_aux", "sinks", "position_bias", "is_causal"])
def test_argument_that_changes_the_attention_is_refused_for_packed_examples(batch, special):
    """What a backend can't do is never ignored."""
    model = padfree_patch.apply(tiny("llama"))
    value = False if special == "is_causal" else torch.ones(6)
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, special: value}), with_kwargs=True)
    with pytest.raises(PadfreeError, match=f"LlamaAttention calls sdpa_attention_forward with {special}"):
        model(**batch)
