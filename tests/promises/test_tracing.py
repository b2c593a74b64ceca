"""Tracers and torch.func's transforms see ordinary calls as unpatched, and are refused packed rows (promise 3)."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from padfree_patch import PadfreeError, apply
from padfree_patch.registry import registry
from padfree_patch.testing import examples, pack, pad, tiny_model
from padfree_patch.wrapping.seam import wrapped

pytestmark = pytest.mark.versions

PADDED = {name: value for name, value in pad(examples((4, 7))).items() if name != "labels"}
CALLS = {
    "padded": PADDED,
    "right-padded with positions": {**PADDED, "position_ids": torch.arange(7).repeat(2, 1)},
    "one text": {"input_ids": PADDED["input_ids"][1:], "position_ids": torch.arange(7).unsqueeze(0)},
}
ROW = pack(examples((4, 7)))


def small(implementation="eager", **options):
    return tiny_model(registry().get("llama"), implementation, num_hidden_layers=1, **options)


def result_or_error(trace, model, call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and upstream's own
        try:
            return trace(model, call)
        except PadfreeError:
            raise
        except Exception as error:  # what upstream can't do in this version
            return f"{type(error).__name__}: {error}"


def assert_same(found, expected):
    """Passes only for results; the same error from both is a skip that says so."""
    if isinstance(expected, str):
        assert found == expected
        pytest.skip(f"upstream fails unpatched, and the patched model alike: {expected[:80]}")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def exported(model, call):
    shapes = {name: {1: torch.export.Dim.DYNAMIC} for name in call} | {"use_cache": None}
    program = torch.export.export(model, (), {**call, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    shorter = {name: value[:, :5] for name, value in call.items()}
    return program.module()(**shorter, use_cache=False).logits


def exported_strictly(model, call):
    program = torch.export.export(model, (), {**call, "use_cache": False}, strict=True)
    return program.module()(**call, use_cache=False).logits


def jit_traced(model, call):
    class ByPosition(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *given):
            return self.model(**dict(zip(call, given)), use_cache=False, return_dict=False)[0]

    return torch.jit.trace(ByPosition().eval(), tuple(call.values()), check_trace=False)(*call.values())


def fx_traced(model, call):
    from transformers.utils.fx import symbolic_trace

    before = {name: each for name, each in vars(torch).items() if callable(each)}
    try:
        return symbolic_trace(model, list(call))(**call)["logits"]
    finally:  # a trace that fails leaves upstream's own in the place of torch.arange and others, for all later tests
        vars(torch).update(before)


def logits(model, weights, call):
    return torch.func.functional_call(model, weights, (), {**call, "use_cache": False}).logits


def gradients(model, call):
    weights = {name: each.detach() for name, each in model.named_parameters()}
    return torch.func.grad(lambda given: logits(model, given, call).square().sum())(weights)


def directional(model, call):
    weights = {name: each.detach() for name, each in model.named_parameters()}
    ones = {name: torch.ones_like(each) for name, each in weights.items()}
    return torch.func.jvp(lambda given: logits(model, given, call).sum(), (weights,), (ones,))


def gradients_of_each_row(model, call):
    """Of every example by itself, as influence functions want them."""
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(given, row):
        return logits(model, given, {name: each.unsqueeze(0) for name, each in row.items()}).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, call)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [exported, exported_strictly])
def test_a_padded_batch_is_exported_as_unpatched(trace):
    expected = result_or_error(trace, small(), PADDED)
    if isinstance(expected, str):
        pytest.skip(f"upstream can't be exported in this version: {expected[:80]}")
    assert_same(result_or_error(trace, apply(small(), verify=False), PADDED), expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("trace", [jit_traced, gradients, directional])
def test_ordinary_calls_are_traced_as_unpatched(trace, call):
    expected = result_or_error(trace, small(), CALLS[call])
    assert_same(result_or_error(trace, apply(small()), CALLS[call]), expected)


@pytest.mark.skipif(importlib.util.find_spec("transformers.utils.fx") is None, reason="gone from transformers 5 on")
@pytest.mark.parametrize("call", CALLS)
def test_fx_traces_models_of_a_patched_class(call):
    expected = result_or_error(fx_traced, small(), CALLS[call])
    patched = apply(small())
    found = [result_or_error(fx_traced, model, CALLS[call]) for model in (small(), patched)]
    if isinstance(expected, str):
        assert found == [expected] * 2
    for each in found:
        assert_same(each, expected)


class AnyKeywords(torch.nn.Module):
    def forward(self, values, factor=2, *args, offset=1, **kwargs):
        return values * factor + offset


def test_fx_traces_a_wrapped_forward_of_any_keywords(monkeypatch):
    """As those of transformers 4.47 are, which torch.fx gives as many arguments as the code that it looked at."""
    ones = torch.ones(3)
    monkeypatch.setattr(AnyKeywords, "forward", wrapped(AnyKeywords.forward, lambda *_: False, lambda _: None))
    traced = torch.fx.symbolic_trace(AnyKeywords())
    torch.testing.assert_close(traced(ones, factor=3), ones * 4)


def test_rows_are_transformed_one_by_one_as_unpatched():
    rows = {**PADDED, "position_ids": torch.arange(7).repeat(2, 1)}
    expected = result_or_error(gradients_of_each_row, small(), rows)
    assert_same(result_or_error(gradients_of_each_row, apply(small()), rows), expected)


@pytest.mark.parametrize(
    ("trace", "how"), [(gradients, "torch.func"), (directional, "torch.func"), (jit_traced, "torch.jit.trace")]
)
def test_packed_rows_are_refused_by_name(trace, how):
    """The control: the values are read."""
    with pytest.raises(PadfreeError, match=f"LlamaForCausalLM: a packed batch inside .*{how}"):
        result_or_error(trace, apply(small()), ROW)


def test_packed_rows_are_refused_under_vmap():
    with pytest.raises(PadfreeError, match="a packed batch inside a transform of torch"):
        result_or_error(gradients_of_each_row, apply(small()), {name: each.repeat(2, 1) for name, each in ROW.items()})


def test_jit_trace_warns_of_nothing_of_ours():
    """It would warn of every value that is read, and call the trace wrong for it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            jit_traced(apply(small()), CALLS["right-padded with positions"])
        except RuntimeError:
            pytest.skip("upstream can't be traced in this version")
    assert not [each for each in seen if "padfree_patch" in each.filename]
