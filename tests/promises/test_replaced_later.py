"""Promise 2: whatever somebody replaces after `apply`, a packed call is exact, or an error that names who was silent.

The controls: unpatched, the same row mixes (test_silent_holes.py); without the checks of `padfree_patch.seams.answers`,
the replaced mask builder gives wrong logits in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import padfree_patch
from helpers.models import assert_exact
from padfree_patch import PadfreeError
from padfree_patch.registry import registry
from padfree_patch.seams import answers
from padfree_patch.testing import conformance, examples, tiny_model
from padfree_patch.wrapping import seam
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions


@pytest.fixture
def model(make, clean_start):
    return padfree_patch.apply(make())


@contextlib.contextmanager
def put_in_place(place: seam.Seam, function):
    """Replaces what stands at a seam now, as somebody would who does not know of us."""
    (installed,) = seam.installed[place]
    put = installed.holder.__setitem__ if isinstance(installed.holder, dict) else None
    put = put or functools.partial(setattr, installed.holder)
    put(place.name, function)
    try:
        yield
    finally:
        if place in seam.installed:
            put(place.name, installed.wrapper)


def assert_exact_or_refused(model, batch, alone) -> str | None:
    """Returns the error's text, if it is one of ours."""
    try:
        with torch.no_grad():
            found = model(**batch)[0]
    except PadfreeError as error:
        return str(error)
    assert conformance.largest(found - alone) < conformance.LOGIT_TOLERANCE * conformance.largest(alone)
    return None


def copies_of_upstreams(place: seam.Seam):
    (installed,) = seam.installed[place]
    upstream = seam.original_of(installed.wrapper)
    yield upstream
    yield functools.wraps(upstream)(lambda *args, **kwargs: upstream(*args, **kwargs))
    if place.name not in ("forward", "__call__"):
        yield lambda *args, **kwargs: None


@pytest.mark.parametrize("bare", [False, True], ids=["head", "decoder"])
def test_function_replaced_after_apply_is_answered_or_named(make, bare, batch, clean_start):
    model = make().base_model if bare else make()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=each)[0] for each in examples(conformance.LENGTHS)], dim=1)
    padfree_patch.apply(model)
    for place in OptIn.of(model).seams:
        for function in copies_of_upstreams(place):
            with put_in_place(place, function):
                error = assert_exact_or_refused(model, batch, alone)
            assert error is None or str(place) in error
    assert assert_exact_or_refused(model, batch, alone) is None


def test_forward_replaced_on_an_instance_is_answered_or_named(model, batch, alone):
    for name, module in model.named_modules():
        if OptIn.of(module) is None:
            continue
        upstream = seam.original_of(type(module).forward)
        around = functools.wraps(upstream)(lambda self, *args, of=upstream, **kwargs: of(self, *args, **kwargs))
        for function in (upstream, around):
            module.forward = types.MethodType(function, module)
            error = assert_exact_or_refused(model, batch, alone)
            assert error is None or name.removeprefix("model.") in error
            del module.forward
    assert_exact(model, batch, alone)


def builders_of(model) -> list[seam.Seam]:
    return [place for place in OptIn.of(model).seams if "mask" in place.name]


def test_mask_builder_that_returns_nothing_is_named(model, batch, alone, monkeypatch):
    with contextlib.ExitStack() as stack:
        for place in builders_of(model):
            stack.enter_context(put_in_place(place, lambda *args, **kwargs: None))
        says = r"LlamaModel|MistralModel|Qwen2Model: the packed call was not answered by layers.0.self_attn"
        with pytest.raises(PadfreeError, match=says):
            model(**batch)
        with unchecked(monkeypatch), pytest.raises(AssertionError):  # the control
            assert_exact(model, batch, alone)


@contextlib.contextmanager
def unchecked(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("padfree_patch.seams.decoder.answering", lambda *_: contextlib.nullcontext())
        patch.setattr("padfree_patch.seams.head.answering", lambda *_: contextlib.nullcontext())
        yield


def test_apply_again_patches_what_is_there_then(model, batch, alone):
    """Somebody's builder around upstream's: an error first, exact once it is patched, and theirs after restore."""
    (place, *_) = [each for each in builders_of(model) if not isinstance(each.owner, type)] or builders_of(model)
    with contextlib.ExitStack() as stack:
        theirs = {}
        for place in builders_of(model):
            theirs[place] = list(copies_of_upstreams(place))[1]
            stack.enter_context(put_in_place(place, theirs[place]))
        with pytest.raises(PadfreeError, match="replaced since apply"):
            model(**batch)
        padfree_patch.apply(model)
        assert_exact(model, batch, alone)
        holders = {place: seam.installed[place][-1].holder for place in theirs}
        padfree_patch.restore(model)
        for place, holder in holders.items():
            assert vars(holder)[place.name] is theirs[place]
            setattr(holder, place.name, theirs[place].__wrapped__)


class OwnAttention(nn.Module):
    """Attention of somebody's own, without positions: causal over the whole row, whatever the mask says."""

    def __init__(self, like):
        super().__init__()
        self.like = [like]  # not registered: its class is not ours to find
        self.results = 3 if hasattr(sys.modules[type(like).__module__], "LLAMA_ATTENTION_CLASSES") else 2

    def forward(self, hidden_states, **kwargs):
        like = self.like[0]
        q, k, v = (
            project(hidden_states).unflatten(2, (-1, like.head_dim)).transpose(1, 2)
            for project in (like.q_proj, like.k_proj, like.v_proj)
        )
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (like.o_proj(mixed.transpose(1, 2).flatten(2)), None, None)[: self.results]


def test_attention_replaced_by_another_module_is_an_error(llama, batch):
    padfree_patch.apply(llama)
    llama.model.layers[1].self_attn = OwnAttention(llama.model.layers[1].self_attn)
    with pytest.raises(PadfreeError, match="ran 2 layers with patched attention, and apply had patched 3"):
        llama(**batch)


def test_layers_replaced_by_those_of_another_model_are_an_error(make, batch):
    """That before 4.48 their attention fails with the stand-in for a mask would say nothing of why."""
    model, other = padfree_patch.apply(make()), make()
    decoder, of_other = (each.base_model for each in (model, other))
    layers = next(name for name, each in decoder.named_children() if isinstance(each, torch.nn.ModuleList))
    getattr(decoder, layers)[1] = getattr(of_other, layers)[1]
    with pytest.raises(PadfreeError, match=r"packed call (ran|fails with).*; something on the way to them"):
        model(**batch)


def test_layer_that_goes_past_its_attention_is_an_error(llama, batch):
    padfree_patch.apply(llama)
    layer = llama.model.layers[1]
    own = OwnAttention(layer.self_attn)
    whole = own.results == 2 and padfree_patch.versions.transformers(">=4.54")  # what a layer returns
    layer.forward = lambda hidden_states, **kwargs: (
        own(hidden_states)[0] if whole else (own(hidden_states)[0], None, None)
    )
    with pytest.raises(PadfreeError, match=r"was not answered by layers.1.self_attn \(Llama"):
        llama(**batch)


def test_modeling_file_that_is_loaded_again_is_noticed(llama, batch):
    """Where nothing that a model needs is looked up there (4.38 to 4.47), its call stays exact."""
    expected = padfree_patch.apply(llama)(**batch).logits
    file = sys.modules[type(llama.model).__module__]
    kept = dict(vars(file))
    try:
        importlib.reload(file)
        error = assert_exact_or_refused(llama, batch, expected)
        assert error is None or "replaced since apply" in error
        assert error is not None or padfree_patch.versions.transformers("<4.48")
    finally:
        vars(file).update(kept)
    assert assert_exact_or_refused(llama, batch, expected) is None


def test_layers_that_the_config_leaves_out_need_not_answer(make, batch):
    model = padfree_patch.apply(make())
    model.config.num_hidden_layers -= 1
    plain = make()
    plain.config.num_hidden_layers -= 1
    assert_exact(model, batch, conformance.logits_alone(lambda: plain, examples(conformance.LENGTHS)))


def test_call_after_a_failed_one_is_answered(model, batch, alone):
    def fail(*_):
        raise RuntimeError("of a hook")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="of a hook"):
        model(**batch)
    hook.remove()
    assert_exact(model, batch, alone)
    assert answers.under_way.answers is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_recomputed_in_the_backward_are_expected_once(make, batch, reentrant):
    model = padfree_patch.apply(make()).train()
    for layer in model.model.layers:
        layer.forward = lambda *args, forward=layer.forward, **kwargs: checkpoint(
            functools.partial(forward, **kwargs), *args, use_reentrant=reentrant
        )
    first, second = (model(**batch, labels=batch["input_ids"]).loss for _ in range(2))
    (first + second).backward()


@pytest.mark.skipif(padfree_patch.versions.transformers("<4.48"), reason="no attention interface")
@pytest.mark.parametrize("which", ["upstream's own", "blind to its mask"])
def test_attention_function_registered_after_apply_is_named(batch, which, clean_start):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def blind(module, q, k, v, attention_mask, **kwargs):
        return sdpa_attention_forward(module, q, k, v, None, **kwargs)

    model = padfree_patch.apply(tiny_model(registry().get("llama"), "sdpa"))
    (place,) = [each for each in OptIn.of(model).seams if each.name == "sdpa"]
    function = blind if which == "blind to its mask" else sdpa_attention_forward
    says = r"replaced since apply: .*ALL_ATTENTION_FUNCTIONS\['sdpa'\]"
    with put_in_place(place, function), pytest.raises(PadfreeError, match=says):
        model(**batch)
