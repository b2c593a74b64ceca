"""Gradient checkpointing runs layers again: exact, or refused, where modules are told by the forward."""

from __future__ import annotations

import pytest
from torch.utils.checkpoint import checkpoint

import padfree_patch
from helpers.any_decoder import maker
from padfree_patch import PadfreeError
from padfree_patch.testing import checkpointing, examples, pack
from padfree_patch.testing.oracle import assert_gradients_close, gradients_of

pytestmark = pytest.mark.versions

ROWS = [pack(examples((5, 9, 4))), pack(examples((10, 8), seed=4))]


def gradients(model):
    sum(model(**row, labels=row["input_ids"]).loss for row in ROWS).backward()
    return {name: each.clone() for name, each in gradients_of(model).items()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_positions_outside_the_layers_are_exact(reentrant):
    """BART's are counted by a module that verify names; it lies outside of what is run again."""
    make = maker("bart")
    expected = gradients(padfree_patch.apply(make()).train())
    model = padfree_patch.apply(make()).train()
    checkpointing(reentrant=reentrant)(model)
    gradients(model)
    assert_gradients_close(model, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_named_modules_inside_layers_are_refused(reentrant):
    model = padfree_patch.apply(maker("rwkv")()).train()
    checkpointing(reentrant=reentrant)(model)
    with pytest.raises(PadfreeError, match=r"RwkvSelfAttention.* on each sequence, which gradient checkpointing would"):
        model(**ROWS[0])
    model.gradient_checkpointing_disable()
    model(**ROWS[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_named_modules_that_somebody_runs_again_are_refused(reentrant):
    """Checkpointing of one's own, which no flag says."""
    model = padfree_patch.apply(maker("rwkv")()).train()
    block = model.rwkv.blocks[0]
    forward = block.forward
    block.forward = lambda hidden, **given: checkpoint(lambda h: forward(h, **given), hidden, use_reentrant=reentrant)
    with pytest.raises(PadfreeError, match="runs again in a backward"):
        model(**ROWS[0], labels=ROWS[0]["input_ids"]).loss.backward()
