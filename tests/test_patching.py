"""Promise 3: apply is all or nothing, reaches only its model, survives what people do to models, and is taken back."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import io
import logging
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from conftest import assert_exact

import padfree_patch
from padfree_patch import PadfreeError, patching, verification
from padfree_patch.registry import registry
from padfree_patch.seams import mask
from padfree_patch.testing import conformance, examples, tiny_model
from padfree_patch.wrapping import opt_in, seam
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions


def snapshot(model) -> dict:
    """The `vars` of every module, of their classes, and of the modeling file: what apply could have changed."""
    import transformers.models

    seen = {}
    for name, module in model.named_modules():
        seen[name] = dict(vars(module))
        for base in type(module).__mro__:
            seen[base] = dict(vars(base))
            if base.__module__.startswith(transformers.models.__name__):
                seen[base.__module__] = dict(vars(sys.modules[base.__module__]))
    return seen


@pytest.fixture(autouse=True)
def _clean_start():
    """Without the class patches of models that earlier tests have left behind as garbage."""
    gc.collect()
    opt_in.living.clear()
    opt_in.remove_unused_seams()
    assert not seam.installed


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


def test_failed_verification_rolls_back(make, monkeypatch):
    model = make()
    before = snapshot(model)
    leaky = padfree_patch.Verification(
        "Tiny", logit_change=0.5, leaked_gradient=0.1, alone_error=0.5, first_leak="model.layers.0.self_attn"
    )
    monkeypatch.setattr(padfree_patch.verification, "verify", lambda model: leaky)
    with pytest.raises(padfree_patch.LeakError, match=r"EXAMPLES MIX(.|\n)*model\.layers\.0\.self_attn"):
        padfree_patch.apply(model)
    assert snapshot(model) == before


class OneExampleOnly(torch.nn.Module):
    """A layer around another that fails on rows as long as the probe's packed one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] == sum(verification.LENGTHS):
            raise IndexError("too long")
        return self.layer(hidden_states, **kwargs)


def test_model_that_cannot_run_a_packed_row_is_refused(llama):
    """Whatever upstream raises: it is ours to say, and the model is as it was."""
    llama.model.layers[1] = OneExampleOnly(llama.model.layers[1])
    before = snapshot(llama)
    with pytest.raises(PadfreeError, match=r"llama: the patched model can't run a packed row: IndexError.* put back"):
        padfree_patch.apply(llama)
    assert snapshot(llama) == before


def test_model_that_cannot_run_unpatched_either_is_not_called_ours(llama):
    """The control is the test before: the same error, of a model that runs unpatched."""
    llama.model.layers[1] = torch.nn.Linear(2, 2)
    before = snapshot(llama)
    says = r"LlamaForCausalLM fails without padfree_patch too, .*transformers [45]\..*Error\(.*put back.*verify=False"
    with pytest.raises(PadfreeError, match=says):
        padfree_patch.apply(llama)
    assert snapshot(llama) == before


def test_whose_error_it_is_leaves_an_earlier_patch(llama):
    padfree_patch.apply(llama, backend="sdpa")
    llama.model.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(PadfreeError, match="fails without padfree_patch too"):
        padfree_patch.apply(llama, backend="auto")
    assert OptIn.of(llama).backend == "sdpa"


def test_unverifiable_model_is_patched_with_a_warning():
    with torch.device("meta"):
        model = tiny_model(registry().get("llama"))
    with pytest.warns(
        UserWarning, match=r"could not check its work: parameter .* on the meta device(.|\n)*verify=False"
    ):
        padfree_patch.apply(model)
    assert patching.is_applied(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "LlamaAttentionX"},
            "no module of class LlamaAttentionX in .*; found .*LlamaMLP",
        ),
        ({"decoder": "LlamaModelX"}, "no module of class LlamaModelX"),
        ({"attention": "LlamaMLP"}, r"LlamaMLP.forward has no parameter attention_mask; it has (x|hidden_state)"),
    ],
)
def test_changed_upstream_is_refused(llama, monkeypatch, change, message):
    patch = dataclasses.replace(registry().get("llama"), **change)
    monkeypatch.setattr(sys.modules["padfree_patch.patching.plan"], "patch_for", lambda model: patch)
    before = snapshot(llama)
    with pytest.raises(PadfreeError, match=message) as caught:
        padfree_patch.apply(llama)
    assert "patch tested on >=4" in str(caught.value)
    assert f"transformers {padfree_patch.versions.transformers_version()}" in str(caught.value)
    assert snapshot(llama) == before


def test_missing_mask_builder_is_refused(llama, monkeypatch):
    monkeypatch.setattr(mask, "BUILDER_FUNCTIONS", ("build_no_mask",))
    monkeypatch.setattr(mask, "BUILDER_METHODS", ("_build_no_mask",))
    with pytest.raises(PadfreeError, match="has none of build_no_mask and LlamaModel none of _build_no_mask"):
        padfree_patch.apply(llama)


def test_forward_replaced_on_the_instance_is_refused(llama):
    original = llama.forward
    llama.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(PadfreeError, match=r"replaced on the instance by .*call padfree_patch\.apply before"):
        padfree_patch.apply(llama)
    assert not patching.is_applied(llama)


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


def test_head_reached_through_its_function(make, batch):
    """accelerate's mixed precision calls `model.forward.__func__`: it must be the patched one."""
    with padfree_patch.applied(make()) as model:
        lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 14, 15, 27], dtype=torch.int32)}
        direct = model(**batch).logits
        through = model.forward.__func__(model, input_ids=batch["input_ids"], **lengths).logits
        assert torch.equal(through, direct)


def test_deepcopy_is_patched_and_independent(make, batch, alone):
    model = padfree_patch.apply(make())
    twin = copy.deepcopy(model)
    padfree_patch.restore(model)
    assert_exact(twin, batch, alone)
    with pytest.raises(AssertionError):
        assert_exact(model, batch, alone)
    padfree_patch.restore(twin)
    with pytest.raises(AssertionError):
        assert_exact(twin, batch, alone)


def test_saved_module_comes_back_patched(make, batch, alone):
    model = padfree_patch.apply(make())
    file = io.BytesIO()
    torch.save(model, file)
    padfree_patch.restore(model)
    assert not seam.installed
    file.seek(0)
    assert_exact(torch.load(file, weights_only=False), batch, alone)


def test_saved_module_comes_back_patched_in_another_process(llama, batch, tmp_path):
    alone = conformance.logits_alone(lambda: copy.deepcopy(llama), examples(conformance.LENGTHS))
    torch.save(padfree_patch.apply(llama), tmp_path / "model.pt")
    torch.save((batch, alone), tmp_path / "expected.pt")
    program = """
        import torch
        model = torch.load("model.pt", weights_only=False)
        batch, alone = torch.load("expected.pt")
        error = (model(**batch).logits - alone).abs().max() / alone.abs().max()
        assert error < 2e-5, error
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)


def test_opt_in_alone_can_be_pickled(llama):
    padfree_patch.apply(llama)
    saved = OptIn.of(llama)
    other = pickle.loads(pickle.dumps(saved))
    assert (other.backend, other.seams) == (saved.backend, saved.seams)


def test_replica_of_data_parallel_is_patched(make, batch, alone):
    """`replicate` needs GPUs; this is what it does to every module, with the parameters of the original."""
    model = padfree_patch.apply(make())
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
            setattr(replica, name, replicas.get(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
    replica = replicas[model]
    assert replica is not model
    assert_exact(replica, batch, alone)


def test_wrapped_models_are_found(make, batch, alone):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapper = Wrapper(make())
    with padfree_patch.applied(wrapper):
        assert_exact(wrapper, batch, alone)


def test_wrapper_of_others_around_ours_does_no_harm(make, batch, alone):
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


def test_wrappers_cannot_be_unwrapped(llama):
    """accelerate's unwrap_model follows `__wrapped__` and puts what it finds on the instance: must be ours."""
    upstream = type(llama).forward
    with padfree_patch.applied(llama):
        ours = type(llama).forward
        assert not hasattr(ours, "__wrapped__") or ours.__wrapped__ is not upstream
        assert inspect.signature(ours) == inspect.signature(upstream)
        assert (ours.__name__, ours.__doc__) == (upstream.__name__, upstream.__doc__)


def test_applied_puts_the_backend_back(llama):
    padfree_patch.apply(llama)
    with padfree_patch.applied(llama, backend="sdpa"):
        assert OptIn.of(llama).backend == "sdpa"
    assert OptIn.of(llama).backend == "auto"


PASSED = padfree_patch.Verification(
    "Tiny", logit_change=0.0, leaked_gradient=0.0, alone_error=0.0, alone_tolerance=1e-5
)


@pytest.fixture(params=["4.20.0", "9.0"])
def untested(request, monkeypatch) -> str:
    running = padfree_patch.versions.Version(request.param)
    monkeypatch.setattr(patching.versions, "transformers_version", lambda: running)
    return request.param


def test_untested_version_is_a_note_in_the_log_once_verified(llama, untested, monkeypatch, caplog):
    monkeypatch.setattr(verification, "verify", lambda model: PASSED)
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama)  # a warning would be an error here
    assert f"this is {untested}; the check of the model itself passed" in caplog.text


def test_untested_version_warns_if_nothing_was_verified(llama, untested, caplog):
    caplog.set_level(logging.INFO, logger="padfree_patch")
    with pytest.warns(UserWarning, match=f"llama was tested on transformers .*, this is {untested}. Leave verify=True"):
        padfree_patch.apply(llama, verify=False)
    assert patching.is_applied(llama) and not caplog.text


def test_untested_version_warns_if_the_check_was_skipped(llama, untested):
    with pytest.warns(UserWarning) as caught:
        padfree_patch.apply(llama.to("meta"))
    assert ["could not check" in str(each.message) for each in caught] == [True, False]
    assert f"this is {untested}" in str(caught[1].message)


def test_tested_version_says_nothing(llama, caplog):
    """The control."""
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama, verify=False)
    assert not caplog.text


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


def test_prompt_tuning_is_refused(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(PadfreeError, match="puts virtual tokens before each row"):
        padfree_patch.apply(model)


def test_distributed_data_parallel(llama, batch, tmp_path):
    alone = conformance.logits_alone(lambda: copy.deepcopy(llama), examples(conformance.LENGTHS))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(llama)
        with padfree_patch.applied(model):
            assert_exact(model, batch, alone)
    finally:
        torch.distributed.destroy_process_group()


def test_importing_the_package_imports_no_model_code():
    program = "import padfree_patch, sys; assert not any(m.startswith('transformers.models.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
