"""The calls in which upstream mixes examples without a word: each is open unpatched and closed by the patch.

On models loaded as flash_attention_2 the same calls are in own_process/flash_attention_2_checks.py.
"""

from __future__ import annotations

import pytest
import torch

from helpers.holes import CALLS, default_call, error_of, is_open
from helpers.models import DIFFERENT, skip_if_unavailable
from padfree_patch import applied
from padfree_patch.testing import conformance, tiny_model

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("patch", DIFFERENT, ids=lambda patch: patch.model_type)
def test_hole_is_open_unpatched_and_closed_by_the_patch(call, patch, implementation):
    def make():
        # Random DBRX is nearly blind to other tokens; with larger weights a leak shows.
        return tiny_model(patch, implementation, initializer_range=0.2)

    skip_if_unavailable(make)
    assert is_open(make, call)
    with applied(make()) as model:
        assert error_of(make, model, call) < conformance.LOGIT_TOLERANCE


def test_positions_that_something_replaced_on_the_way_to_a_layer_do_not_matter(make):
    """The stand-in says where sequences end, and the batch that it carries which positions they have."""

    def replace(layer, args, kwargs):
        if isinstance(positions := kwargs.get("position_ids"), torch.Tensor):
            kwargs["position_ids"] = torch.arange(positions.shape[1])[None]
        return args, kwargs

    model = make()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(replace, with_kwargs=True)
    with applied(model):
        assert error_of(make, model, default_call) < conformance.LOGIT_TOLERANCE
    assert is_open(make, default_call)  # the control
