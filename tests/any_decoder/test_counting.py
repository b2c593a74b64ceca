"""Attention that counts the tokens of its row is never answered by a kernel, however far it has to count to show."""

from __future__ import annotations

import pytest
import torch

from helpers.any_decoder import maker
from padfree_patch import applied, patching
from padfree_patch.any_decoder import way
from padfree_patch.testing import conformance, examples, pack

pytestmark = pytest.mark.versions

make = maker(
    "llama4_text",
    no_rope_layers=[0, 1],
    attn_temperature_tuning=True,
    floor_scale=24,  # from the 24th token on: more than `verify` and one example have
    attn_scale=4.0,
    initializer_range=0.3,
)


def packed_error(model):
    """Returns how far a packed row's logits are from those of each example alone."""
    texts = examples((20, 20))
    alone = conformance.logits_alone(make, texts)
    with torch.no_grad(), applied(model):
        return conformance.largest(model(**pack(texts)).logits - alone)


def test_attention_that_counts_its_tokens_runs_on_each_sequence():
    model = make()
    assert packed_error(model) < 1e-5
    with applied(model):
        assert "Llama4TextAttention per sequence" in patching.way_of(model)


def test_a_kernel_would_pass_the_check_and_be_wrong(monkeypatch):
    """The control."""
    monkeypatch.setattr(way, "counts_tokens", lambda module: False)
    assert packed_error(make()) > 1e-3
