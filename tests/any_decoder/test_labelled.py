"""Logits of labelled tokens only, on models that no patch is registered for."""

from __future__ import annotations

import pytest
import torch

from helpers.any_decoder import CONFIGS, maker
from padfree_patch import apply
from padfree_patch.registry import registry
from padfree_patch.seams import labelled
from padfree_patch.testing import conformance, examples, pack

pytestmark = pytest.mark.versions

SEQUENCES = examples((5, 9, 2, 12))
KINDS = [name for name in CONFIGS if registry().get(name) is None]


@pytest.fixture
def batch():
    return pack(SEQUENCES) | {"labels": torch.cat(conformance.completions(SEQUENCES), dim=1)}


def step(model, batch):
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def rows_of_head(model):
    """A list that takes the rows of each call of the module that makes logits."""
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_with_all_logits(kind, batch, monkeypatch):
    """Those are each example's alone: test_every_kind.py."""
    monkeypatch.setattr(labelled, "CHUNK", 5)
    expected = step(apply(maker(kind)()), batch)
    for logits in ("labelled", "chunked"):
        model = apply(maker(kind)(), logits=logits)
        rows = rows_of_head(model)
        found = step(model, batch)
        assert max(rows) < 20 < batch["labels"].shape[1]
        assert found[0] == pytest.approx(expected[0], rel=2e-6)
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= conformance.GRADIENT_TOLERANCE * gradient.norm() + 1e-9, name
