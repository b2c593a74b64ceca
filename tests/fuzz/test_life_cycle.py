"""apply, restore and everything that happens to models between them: each is patched or not, and never half."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import types
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from helpers.fuzzing import bounded, is_refusal, outcome, same, small_llama
from helpers.snapshots import snapshot
from padfree_patch import applied, apply, patching, restore
from padfree_patch.patching import state
from padfree_patch.testing import checkpointing, conformance, examples, pack, pad
from padfree_patch.wrapping import opt_in, seam

pytestmark = pytest.mark.fuzz

EXAMPLES = examples((3, 1, 6), vocab_size=32)
PACKED = {**pack(EXAMPLES), "labels": torch.cat(EXAMPLES, 1)}
PADDED = pad(EXAMPLES)
IMPLEMENTATIONS = ("sdpa", "eager")
PLACES = ("", "model", "model.layers.0.self_attn", "model.layers.0")


plain = functools.cache(small_llama)


@functools.cache
def plain_in_training(implementation: str, reentrant: bool) -> Any:
    """An unpatched model with gradient checkpointing: without a cache, upstream isolates from 4.53 on."""
    model = small_llama(implementation).train()
    checkpointing(reentrant=reentrant)(model)
    return model


@functools.cache
def alone(implementation: str) -> tuple[Tensor, float, dict[str, Tensor]]:
    maker = functools.partial(small_llama, implementation)
    return conformance.logits_alone(maker, EXAMPLES), *conformance.alone_loss_and_gradients(maker, EXAMPLES)


def logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        output = model(**batch)
    return output.logits, output.loss


@dataclasses.dataclass(eq=False)
class Owned:
    """A model, and what is known to have been done to it."""

    model: Any
    implementation: str
    patched: bool = False
    contexts: list[tuple[Any, bool]] = dataclasses.field(default_factory=list)
    """Of `applied`, the innermost last, and whether the model was patched before each."""
    has_hooks: bool = False
    reentrant: bool | None = None
    """The kind of gradient checkpointing that is on, if one is."""

    def unpatched(self) -> Any:
        """Returns a model that nothing was done to, in the same mode."""
        if self.reentrant is None:
            return plain(self.implementation)
        return plain_in_training(self.implementation, self.reentrant)


class LifeCycle(RuleBasedStateMachine):
    models = Bundle("models")

    def __init__(self):
        super().__init__()
        self.before = snapshot(plain("sdpa"))
        self.owned: list[Owned] = []

    def own(self, model: Any, like: Owned | None = None, **known: Any) -> Owned:
        if like is not None:
            known = {name: getattr(like, name) for name in ("implementation", "patched", "has_hooks", "reentrant")}
        found = Owned(model, **known)
        self.owned.append(found)
        self.check(found)
        return found

    def check(self, one: Owned) -> None:
        """Raises AssertionError unless a model is wholly patched or wholly unpatched, as it must be."""
        model, reference = one.model, one.unpatched()
        assert patching.is_applied(model) == one.patched
        assert same(outcome(lambda: logits(model, PADDED)), logits(reference, PADDED))
        if not one.patched:
            assert same(outcome(lambda: logits(model, PACKED)), logits(reference, PACKED))
            return
        wanted, loss, gradients = alone(one.implementation)
        model.zero_grad()
        output = model(**PACKED)
        output.loss.backward()
        conformance.assert_logits_close(output.logits, wanted)
        assert abs(output.loss.item() - loss) < 1e-5
        conformance.assert_gradients_close(model, gradients)

    @rule(target=models, implementation=st.sampled_from(IMPLEMENTATIONS))
    def build(self, implementation):
        return self.own(small_llama(implementation), implementation=implementation)

    @rule(one=models, backend=st.sampled_from(["auto", "sdpa"]), verify=st.booleans())
    def apply(self, one, backend, verify):
        apply(one.model, backend=backend, verify=verify)
        one.patched = True
        self.check(one)

    @rule(one=models)
    def restore(self, one):
        restore(one.model)
        one.patched = False
        self.check(one)

    @rule(one=models)
    def enter_applied(self, one):
        context = applied(one.model)
        context.__enter__()
        one.contexts.append((context, one.patched))
        one.patched = True
        self.check(one)

    @precondition(lambda self: any(one.contexts for one in self.owned))
    @rule(one=models, fails=st.booleans())
    def leave_applied(self, one, fails):
        if one.contexts:
            self.leave(one, ZeroDivisionError() if fails else None)
            self.check(one)

    def leave(self, one: Owned, error: Exception | None = None) -> None:
        context, one.patched = one.contexts.pop()
        try:
            context.__exit__(type(error) if error else None, error, None)
        except ZeroDivisionError as same_error:
            assert same_error is error

    @rule(one=models, backend=st.sampled_from(["none such", "auto"]))
    def apply_that_fails(self, one, backend):
        with fails_inside(one.model):
            assert is_refusal(outcome(lambda: apply(one.model, backend=backend)))
        self.check(one)

    @rule(one=models)
    def call_that_fails(self, one):
        with fails_inside(one.model):
            assert isinstance(outcome(lambda: logits(one.model, PACKED)), (ZeroDivisionError, ValueError))
        self.check(one)

    @rule(target=models, one=models)
    def deepcopy(self, one):
        return self.own(copy.deepcopy(one.model), like=one)

    @precondition(lambda self: any(not one.has_hooks for one in self.owned))
    @rule(target=models, one=models)
    def pickle(self, one):
        if one.has_hooks:  # which upstream makes of a function that can't be pickled
            return one
        return self.own(pickle.loads(pickle.dumps(one.model)), like=one)

    @rule(one=models, reentrant=st.booleans())
    def train(self, one, reentrant):
        checkpointing(reentrant=reentrant)(one.model.train())
        one.has_hooks, one.reentrant = True, reentrant
        self.check(one)

    @rule(one=models)
    def evaluate(self, one):
        one.model.gradient_checkpointing_disable()
        one.model.eval()
        one.reentrant = None
        self.check(one)

    @rule(one=models, place=st.sampled_from(PLACES), how=st.sampled_from(["around", "past"]), on_class=st.booleans())
    def replace_forward(self, one, place, how, on_class):
        with replaced(one.model.get_submodule(place), how, on_class=on_class):
            found = outcome(lambda: logits(one.model, PACKED))
            if one.patched and not is_refusal(found):
                assert not isinstance(found, Exception), found
                conformance.assert_logits_close(found[0], alone(one.implementation)[0])
                assert abs(found[1].item() - alone(one.implementation)[1]) < 1e-5
            assert not (is_refusal(found) and how == "around"), found
        for each in self.owned:
            self.check(each)

    @rule(one=consumes(models))
    def drop(self, one):
        if not one.contexts:
            self.owned.remove(one)
            one.model = None
            gc.collect()

    def teardown(self):
        for one in self.owned:
            while one.contexts:
                self.leave(one)
            restore(one.model)
        self.owned.clear()
        gc.collect()
        opt_in.remove_unused_seams()
        assert not seam.installed
        assert not changed(self.before, snapshot(plain("sdpa")))


def changed(before: dict[Any, dict[str, Any]], after: dict[Any, dict[str, Any]]) -> list[tuple[Any, str]]:
    """Returns whose attributes are others than before, by name."""
    absent = object()
    return [
        (owner, name)
        for owner, now in after.items()
        for name in {**before[owner], **now}
        if before[owner].get(name, absent) is not now.get(name, absent)
    ]


@contextmanager
def fails_inside(model: nn.Module):
    """Lets the attention fail while this runs."""

    def fail(*_):
        raise ZeroDivisionError

    hook = model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def replaced(module: nn.Module, how: str, *, on_class: bool):
    """Puts another forward on a module, or on its class: around what is there, or past it to upstream's own."""
    function = type(module).forward
    inner = seam.original_of(function) if how == "past" else function

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        return inner(self, *args, **kwargs)

    holder = type(module) if on_class else module
    own = vars(holder).get("forward")
    holder.forward = forward if on_class else types.MethodType(forward, module)
    try:
        yield
    finally:
        if own is not None:
            holder.forward = own
        else:
            del holder.forward


@pytest.fixture(autouse=True)
def _clean(clean_start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about checkpoints without gradients
        yield
    gc.collect()
    opt_in.living.clear()
    opt_in.remove_unused_seams()


def test_models_are_patched_or_not_whatever_happens_to_them():
    run_state_machine_as_test(LifeCycle, settings=bounded(15, slower=20, stateful_step_count=15))


def assert_life_cycle_fails() -> None:
    one_fault = settings(
        bounded(30, stateful_step_count=10), phases=[Phase.generate], report_multiple_bugs=False, max_examples=30
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(LifeCycle, settings=one_fault)


def test_a_context_that_does_not_restore_is_found(monkeypatch):
    monkeypatch.setattr(state.State, "put_back", lambda self: None)
    assert_life_cycle_fails()


def test_a_restore_that_forgets_the_attention_is_found(monkeypatch):
    detach = opt_in.OptIn.detach

    def forgets(module):
        if "Attention" not in type(module).__name__:
            detach(module)

    monkeypatch.setattr(opt_in.OptIn, "detach", staticmethod(forgets))
    assert_life_cycle_fails()
