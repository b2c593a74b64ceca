"""Router logits of layers that ran on each sequence are one tensor per layer again, as the head counts them."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from padfree_patch.any_decoder.recorded import join_recorded

LENGTHS, LAYERS, EXPERTS = (5, 9, 1), 2, 4
TOKENS = sum(LENGTHS)
LOGITS = torch.randn(LAYERS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))


def recorded(*, leading=()):
    """What a hook on the router gets when each layer goes through the sequences one by one."""
    return tuple(part.reshape(*leading, -1, EXPERTS) for layer in LOGITS for part in layer.split(LENGTHS))


@pytest.mark.parametrize("leading", [(), (1,)], ids=["rows", "batch of one"])
def test_router_logits_are_one_tensor_per_layer(leading):
    output = MoeModelOutputWithPast(router_logits=recorded(leading=leading))
    assert len(output.router_logits) == LAYERS * len(LENGTHS)
    join_recorded(output, TOKENS)
    assert len(output.router_logits) == LAYERS
    assert torch.equal(torch.stack([each.flatten(0, -2) for each in output.router_logits]), LOGITS)
    assert output["router_logits"] is output.router_logits


@pytest.mark.parametrize(
    "logits",
    [tuple(LOGITS), recorded()[:-1], None, (None, None)],
    ids=["whole", "not all there", "none", "of no layer"],
)
def test_what_was_not_recorded_of_each_sequence_is_left_alone(logits):
    output = MoeModelOutputWithPast(router_logits=logits)
    join_recorded(output, TOKENS)
    assert output.router_logits is logits
