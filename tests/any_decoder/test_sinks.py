"""Attention with sinks: its function is told by what it computes, and then answered by a backend that knows sinks."""

from __future__ import annotations

import pytest
import torch

from helpers.any_decoder import maker
from helpers.models import assert_exact
from padfree_patch import attention
from padfree_patch.any_decoder import interface
from padfree_patch.attention import sdpa
from padfree_patch.patching import apply, way_of
from padfree_patch.seams.kernel import recording_backends
from padfree_patch.testing import conformance, examples, pack

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:padfree_patch.apply could not check its work.*verify=False:UserWarning"),
]

TEXTS = examples((60, 1, 20, 45))
FAST, SLOW = "GptOssAttention by a varlen kernel", "GptOssAttention by upstream's function per sequence"


@pytest.fixture
def make():
    return maker("gpt_oss", sliding_window=24)


@pytest.fixture
def replace(make, monkeypatch):
    """Returns a function that puts another in the place of upstream's attention function."""
    make()  # skips where there is none
    from transformers.models.gpt_oss import modeling_gpt_oss

    own = modeling_gpt_oss.eager_attention_forward

    def replace(function):
        def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            return function(own, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

        monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", eager_attention_forward)

    return replace


def test_backend_computes_sinks(make):
    model = apply(make())
    with recording_backends() as backends:
        assert_exact(model, pack(TEXTS), conformance.logits_alone(make, TEXTS))
    assert (way_of(model), backends) == (FAST, {"sdpa"})


def test_upstreams_function_runs_where_no_backend_knows_sinks(make, monkeypatch):
    monkeypatch.setattr(sdpa, "KNOWS_SINKS", False)
    attention.select.cache_clear()
    model = apply(make())
    with recording_backends() as backends:
        assert_exact(model, pack(TEXTS), conformance.logits_alone(make, TEXTS))
    assert (way_of(model), backends) == (SLOW, set())


def without_sinks(own, module, q, k, v, mask, **kwargs):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return eager_attention_forward(module, q, k, v, mask, kwargs["scaling"])


def with_a_cap(own, module, q, k, v, mask, **kwargs):
    """Caps what the scores could be at most, which no score of a tiny model comes near."""
    return own(module, q.clamp(-90, 90), k.clamp(-90, 90), v, mask, **kwargs)


@pytest.mark.parametrize("function", [without_sinks, with_a_cap])
def test_function_that_computes_something_else_runs_on_each_sequence(make, replace, function):
    replace(function)
    alone = conformance.logits_alone(make, TEXTS)
    model = apply(make())
    assert way_of(model) == SLOW
    assert_exact(model, pack(TEXTS), alone)


def test_a_function_taken_for_what_it_is_not_is_wrong(make, replace, monkeypatch):
    """The control."""
    replace(without_sinks)
    alone = conformance.logits_alone(make, TEXTS)
    monkeypatch.setattr(interface, "takes_sinks", lambda call: True)
    with pytest.raises(AssertionError):
        assert_exact(apply(make(), verify=False), pack(TEXTS), alone)


def test_each_module_is_asked_once(make, replace):
    calls = []

    def counted(own, module, *args, **kwargs):
        calls.append(args[0].shape[2])
        return own(module, *args, **kwargs)

    replace(counted)
    model = apply(make(), verify=False)
    calls.clear()
    with torch.no_grad():
        for _ in range(2):
            model(**pack(TEXTS))
    assert calls == [6, 6] * 2  # two examples for each of two layers


def test_bfloat16_is_as_exact_as_upstream(make):
    exact = conformance.logits_alone(make, TEXTS)
    own = conformance.logits_alone(lambda: make().to(torch.bfloat16), TEXTS)
    with torch.no_grad():
        found = apply(make().to(torch.bfloat16))(**pack(TEXTS)).logits
    assert (found.double() - exact).norm() < 1.2 * (own.double() - exact).norm()
