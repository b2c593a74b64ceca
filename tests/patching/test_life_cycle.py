"""Promise 3: apply reaches only its model, can be repeated, and is taken back without a trace."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import padfree_patch
from helpers.models import assert_exact
from helpers.snapshots import snapshot
from padfree_patch import patching
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model
from padfree_patch.wrapping import seam
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions


def test_apply_twice_restore_once_leaves_everything_as_it_was(make):
    model = make()
    before = snapshot(model)
    assert padfree_patch.apply(model) is model
    assert snapshot(model) != before
    assert padfree_patch.apply(model) is model
    assert padfree_patch.restore(model) is model
    assert snapshot(model) == before


def test_restore_of_an_unpatched_model_changes_nothing(llama):
    before = snapshot(llama)
    padfree_patch.restore(llama)
    assert snapshot(llama) == before


def test_applied_restores_after_an_error(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), padfree_patch.applied(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_applied_leaves_a_patched_model_patched(llama):
    padfree_patch.apply(llama)
    with padfree_patch.applied(llama):
        pass
    assert patching.is_applied(llama)


def test_restore_inside_applied_leaves_a_model_patched_that_was_so_before(make, batch, alone):
    model = padfree_patch.apply(make(), backend="sdpa")
    with padfree_patch.applied(model), padfree_patch.applied(model):
        padfree_patch.restore(model)
    assert_exact(model, batch, alone)
    assert OptIn.of(model).backend == "sdpa"


def test_restore_inside_applied_leaves_a_model_unpatched_that_was_so_before(make):
    model = make()
    before = snapshot(model)
    with padfree_patch.applied(model), padfree_patch.applied(model):
        padfree_patch.restore(model)
        padfree_patch.apply(model)
    assert snapshot(model) == before


def test_seams_go_with_the_last_model_that_needs_them(make, llama):
    """Without any restore: models die of themselves, or in garbage collections."""
    before = snapshot(llama)
    models = [padfree_patch.apply(make()) for _ in range(2)]
    del models[0]
    gc.collect()
    assert seam.installed
    models.clear()
    gc.collect()
    assert not seam.installed
    assert snapshot(llama) == before


def test_seams_of_other_models_stay(make, llama, batch):
    padfree_patch.apply(llama)
    expected = llama(**batch).logits
    padfree_patch.apply(make())
    gc.collect()
    assert torch.equal(llama(**batch).logits, expected)


def test_patches_of_a_dead_model_go_with_the_next_restore(llama):
    before = snapshot(llama)
    padfree_patch.apply(tiny_model(registry().get("llama")))
    padfree_patch.apply(llama)
    padfree_patch.restore(llama)
    assert snapshot(llama) == before


def test_other_model_of_the_class_is_unaffected(make, batch):
    other = make()
    naive = other(**batch).logits
    model = padfree_patch.apply(make())
    assert torch.equal(other(**batch).logits, naive)
    second = padfree_patch.apply(make())
    padfree_patch.restore(model)
    assert torch.equal(model(**batch).logits, naive)
    assert not torch.equal(second(**batch).logits, naive)


def test_applied_puts_the_backend_back(llama):
    padfree_patch.apply(llama)
    with padfree_patch.applied(llama, backend="sdpa"):
        assert OptIn.of(llama).backend == "sdpa"
    assert OptIn.of(llama).backend == "auto"


def test_restore_in_another_thread_does_not_take_the_patch_away(make, batch, alone, monkeypatch):
    other, install = padfree_patch.apply(make()), seam.Seam.install
    thread = threading.Thread(target=padfree_patch.restore, args=(other,))

    def install_while_the_other_restores(place):
        install(place)
        if thread.ident is None:
            thread.start()
            thread.join(timeout=0.2)  # it must wait for the lock

    monkeypatch.setattr(seam.Seam, "install", install_while_the_other_restores)
    model = padfree_patch.apply(make(), verify=False)
    thread.join()
    assert_exact(model, batch, alone)


@pytest.mark.parametrize("first_restored", [0, 1])
def test_subclasses_that_share_a_wrapped_forward_leave_no_wrapper(llama, batch, first_restored):
    """Both forwards hand everything on to Llama's, which is wrapped for either of them, and once."""
    base = type(llama)

    class Handing(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class HandingAgain(Handing):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    classes = Handing, HandingAgain, base
    own = [vars(each)["forward"] for each in classes]
    models = [cls(llama.config).eval() for cls in classes[:2]]
    for model in models:
        padfree_patch.apply(model)
        assert model(**batch).logits.isfinite().all()
    padfree_patch.restore(models[first_restored])
    padfree_patch.restore(models[1 - first_restored])
    assert [vars(each)["forward"] for each in classes] == own
