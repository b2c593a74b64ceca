"""Attention that counts the tokens of its row is never answered by a kernel, however far it has to count to show."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import applied, patching
from padfree_patch.any_decoder import way
from padfree_patch.testing import pack

transformers = pytest.importorskip("transformers", minversion="4.51")
pytestmark = pytest.mark.versions

LENGTHS = (20, 20)


def scaling_from_token_24():
    """Makes a Llama 4 whose queries are scaled beyond the 24th token: more than `verify` and one example have."""
    config = transformers.Llama4TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        no_rope_layers=[0, 1],
        attn_temperature_tuning=True,
        floor_scale=24,
        attn_scale=4.0,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(config).eval()


def packed_error(model):
    """Returns how far a packed row's logits are from those of each example alone."""
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(3, 50, (1, n), generator=generator) for n in LENGTHS]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=each).logits for each in examples], dim=1)
        with applied(model):
            packed = model(**pack(examples)).logits
    return (packed - alone).abs().max().item()


def test_attention_that_counts_its_tokens_runs_on_each_sequence():
    model = scaling_from_token_24()
    assert packed_error(model) < 1e-5
    with applied(model):
        assert "Llama4TextAttention per sequence" in patching.way_of(model)


def test_a_kernel_would_pass_the_check_and_be_wrong(monkeypatch):
    """The control."""
    monkeypatch.setattr(way, "counts_tokens", lambda module: False)
    assert packed_error(scaling_from_token_24()) > 1e-3
