"""A kind of seam is one file: what every kind has, and a new one that works with no other change."""

from __future__ import annotations

import inspect
import types

import pytest
import torch

import padfree_patch
from helpers.snapshots import snapshot
from padfree_patch import patching, seams
from padfree_patch.patching.plan import plan
from padfree_patch.registry import registry
from padfree_patch.seams import KINDS
from padfree_patch.seams.kinds import Found, Kind
from padfree_patch.wrapping.opt_in import OptIn
from padfree_patch.wrapping.seam import Seam

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("clean_start")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)
def test_every_kind_has_what_the_protocol_asks_for(kind):
    assert isinstance(kind.NAME, str) and kind.__doc__
    for name in ("find", "answer"):
        expected = list(inspect.signature(getattr(Kind, name)).parameters.values())[1:]  # without self
        found = list(inspect.signature(getattr(kind, name)).parameters.values())
        assert [each.name for each in found] == [each.name for each in expected]
        for mine, asked in zip(found, expected):  # those of every model need no patch
            assert mine.annotation in (asked.annotation, f"{asked.annotation} | None")


def test_every_kind_has_a_name_of_its_own():
    assert len({kind.NAME for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)
def test_find_changes_nothing(llama, kind):
    before = snapshot(llama)
    assert isinstance(kind.find(llama, registry().get("llama")), Found)
    assert snapshot(llama) == before


def is_patched_mlp(args, kwargs):
    return OptIn.of(args[0]) is not None


def doubled(call):
    return 2 * call.proceed()


def mlps_of(model, patch):
    found = tuple(module for module in model.modules() if type(module).__name__.endswith("MLP"))
    return Found(frozenset(Seam(type(each), "forward", is_patched_mlp, doubled) for each in found), found)


@pytest.fixture
def doubling(monkeypatch):
    """A kind of seam that doubles what every MLP of a patched model gives, added as a new file would be."""
    kind = types.SimpleNamespace(NAME="doubled MLP", find=mlps_of, answer=doubled)
    for module in (seams, inspect.getmodule(plan)):
        monkeypatch.setattr(module, "KINDS", (*KINDS, kind))
    return kind


def test_new_kind_is_planned_installed_and_taken_out(llama, doubling):
    before, mlp = snapshot(llama), llama.model.layers[0].mlp
    x = torch.randn(1, 3, llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = mlp(x)
    (seam,) = doubling.find(llama, registry().get("llama")).seams
    planned = plan(llama, registry().get("llama"))
    assert seam in planned.seams and mlp in planned.modules
    padfree_patch.apply(llama, verify=False)
    assert str(seam) in patching.places(llama)
    assert torch.equal(mlp(x), 2 * alone)
    padfree_patch.restore(llama)
    assert snapshot(llama) == before
    assert torch.equal(mlp(x), alone)


def test_without_the_new_kind_nothing_is_doubled(llama):
    """The control."""
    x = torch.randn(1, 3, llama.config.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = llama.model.layers[0].mlp(x)
    padfree_patch.apply(llama, verify=False)
    assert torch.equal(llama.model.layers[0].mlp(x), alone)
