"""Attention that is not causal is refused by name, whenever it is switched off."""

from __future__ import annotations

import pytest

import padfree_patch
from padfree_patch import PadfreeError

pytestmark = pytest.mark.versions


@pytest.fixture
def model(make):
    return padfree_patch.apply(make())


def test_attention_that_is_not_causal_is_refused_by_name(make):
    model = make()
    attention = model.model.layers[1].self_attn
    attention.is_causal = False
    says = rf"{type(attention).__name__} is not causal \(is_causal of {type(attention).__name__} is False\)"
    with pytest.raises(PadfreeError, match=says):
        padfree_patch.apply(model)
    attention.is_causal = True
    padfree_patch.apply(model)


def test_attention_switched_to_not_causal_after_apply_is_refused_by_name(model, batch):
    attention = model.model.layers[1].self_attn
    attention.is_causal = False
    with pytest.raises(PadfreeError, match=f"{type(attention).__name__} is not causal"):
        model(**batch)


def test_config_that_is_not_causal_is_refused_by_name(model, batch, make):
    model.config.is_causal = False
    with pytest.raises(PadfreeError, match="is_causal of its config is False"):
        model(**batch)
    other = make()
    other.config.is_causal = False
    with pytest.raises(PadfreeError, match="is_causal of its config is False"):
        padfree_patch.apply(other)
