"""Promise 3: what other libraries put around a model, its forward or its class reaches the patch, and keeps it."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

import padfree_patch
from helpers.models import assert_exact
from helpers.snapshots import snapshot
from padfree_patch.testing import conformance, examples
from padfree_patch.wrapping import seam

pytestmark = pytest.mark.versions


def test_forward_that_upstream_leaves_on_the_instance_is_no_obstacle(make, batch, alone):
    """transformers 4.52 to 4.57 put a bound method on every layer while they collect hidden states."""
    model = make()
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    attention.forward = attention.forward
    before = snapshot(model)
    with padfree_patch.applied(model):
        assert_exact(model, batch, alone)
        model(**batch, output_hidden_states=True)
        padfree_patch.apply(model)
        assert_exact(model, batch, alone)
    assert vars(attention)["forward"] == before[next(n for n, m in model.named_modules() if m is attention)]["forward"]


def test_accelerate_hooks_are_reached(make, batch, alone):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make()
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with padfree_patch.applied(model):
        assert_exact(model, batch, alone)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_forward_called_as_a_plain_function_is_the_patched_one(make, batch):
    """accelerate's mixed precision calls `model.forward.__func__`: it must be the patched one."""
    with padfree_patch.applied(make()) as model:
        lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 14, 15, 27], dtype=torch.int32)}
        direct = model(**batch).logits
        through = model.forward.__func__(model, input_ids=batch["input_ids"], **lengths).logits
        assert torch.equal(through, direct)


def test_model_inside_a_wrapper_is_found(make, batch, alone):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapper = Wrapper(make())
    with padfree_patch.applied(wrapper):
        assert_exact(wrapper, batch, alone)


def test_model_inside_distributed_data_parallel_is_exact(llama, batch, tmp_path):
    """In a process of its own, left without clearing up: gloo's destructor can wait for Python's lock for ever."""
    alone = conformance.logits_alone(lambda: copy.deepcopy(llama), examples(conformance.LENGTHS))
    torch.save((llama, batch, alone), tmp_path / "given.pt")
    program = """
        import os, torch, padfree_patch
        llama, batch, alone = torch.load("given.pt", weights_only=False)
        rendezvous = "file://" + os.path.abspath("rendezvous")
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        model = torch.nn.parallel.DistributedDataParallel(llama)
        errors = []
        for patched in (True, False):
            with padfree_patch.applied(model) if patched else torch.no_grad():
                errors.append(((model(**batch).logits - alone).abs().max() / alone.abs().max()).item())
        right = errors[0] < 2e-5 < errors[1]  # the second is the control
        print(errors, flush=True)
        os._exit(0 if right else 1)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True, timeout=300)


def test_model_stays_exact_when_somebody_wraps_our_wrapper(make, batch, alone):
    """Somebody wraps the patched class; after restore and apply, ours stands around theirs around ours."""
    model = padfree_patch.apply(make())
    decoder = type(model.base_model)
    before = vars(decoder)["forward"]

    def theirs(self, *args, **kwargs):
        return before(self, *args, **kwargs)

    try:
        decoder.forward = theirs
        theirs.__signature__ = inspect.signature(before)
        padfree_patch.restore(model)
        padfree_patch.apply(model)
        assert_exact(model, batch, alone)
        padfree_patch.restore(model)
        assert vars(decoder)["forward"] is theirs
    finally:
        decoder.forward = seam.original_of(before)


def test_nothing_unwraps_a_forward_to_upstreams(llama):
    """accelerate's unwrap_model follows `__wrapped__` and puts what it finds on the instance: must be ours."""
    upstream = type(llama).forward
    with padfree_patch.applied(llama):
        ours = type(llama).forward
        assert not hasattr(ours, "__wrapped__") or ours.__wrapped__ is not upstream
        assert inspect.signature(ours) == inspect.signature(upstream)
        assert (ours.__name__, ours.__doc__) == (upstream.__name__, upstream.__doc__)
