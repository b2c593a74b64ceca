"""Promise 1 in every dtype: half precision that upstream casts up in places, float64, and float64 under autocast."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.models import skip_if_unavailable
from padfree_patch import applied
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [{}, {"qk_layernorm": True}], ids=str)
def test_attention_that_casts_queries_and_keys_up_gives_the_models_dtype(implementation, config, dtype):
    """Phi on eager, 4.37 to 4.47. Bound: upstream's own error alone, with a factor for the luck of rounding."""

    def make():
        return tiny_model(registry().get("phi"), implementation, **config)

    skip_if_unavailable(make)
    skip_if_unavailable(lambda: make().to(dtype))
    sequences = examples((5, 9, 12))
    exact = conformance.logits_alone(make, sequences)
    upstream = conformance.logits_alone(lambda: make().to(dtype), sequences)
    with applied(make().to(dtype)) as model, torch.no_grad():
        packed = model(**pack(sequences)).logits
    assert packed.dtype == upstream.dtype
    assert (packed.float() - exact).norm() < 1.5 * (upstream.float() - exact).norm()


def in_float64(make):
    """Makes a maker of models in float64, or skips where upstream can't run them: eager before 4.38."""

    def make_in_float64():
        return make().double()

    skip_if_unavailable(make_in_float64)
    return make_in_float64


def test_float64_is_as_exact_as_upstreams_attention(make, implementation):
    """Upstream's eager softmax is float32 in a float64 model too."""
    make_in_float64 = in_float64(make)
    sequences = examples((5, 9, 12))
    alone = conformance.logits_alone(make_in_float64, sequences)
    with applied(make_in_float64()) as model, torch.no_grad():
        error = conformance.largest(model(**pack(sequences)).logits - alone) / conformance.largest(alone)
        measured = padfree_patch.verify(model)
    assert error < (1e-6 if implementation == "eager" or alone.dtype == torch.float32 else 1e-14)
    if implementation == "eager":  # the control: a tolerance of float64 would refuse it
        assert measured.alone_error > 170 * torch.finfo(torch.float64).eps


def test_float64_under_autocast_stays_float64(make):
    """Autocast leaves float64 alone; attention in bfloat16 would be off by 1e-3."""
    make_in_float64 = in_float64(make)
    sequences = examples((5, 9, 12))
    with torch.autocast("cpu", torch.bfloat16):
        alone = conformance.logits_alone(make_in_float64, sequences)
        with applied(make_in_float64()) as model, torch.no_grad():
            packed = model(**pack(sequences)).logits
    assert packed.dtype == alone.dtype
    assert conformance.largest(packed - alone) < 1e-6 * conformance.largest(alone)
