"""Promise 1 for derivatives of derivatives: those of a packed row are those of each example alone on eager attention.

Unpatched sdpa has none: torch says so.
"""

from __future__ import annotations

import pytest
import torch

from padfree_patch import apply
from padfree_patch.registry import registry
from padfree_patch.testing import checkpointing, examples, pack, tiny_model

pytestmark = pytest.mark.versions

LENGTHS = (4, 7, 1, 3)
BATCH = pack(examples(LENGTHS))


def packed(model, embeds):
    return model(inputs_embeds=embeds, position_ids=BATCH["position_ids"], use_cache=False).logits


def alone(model, embeds):
    return torch.cat([model(inputs_embeds=each, use_cache=False).logits for each in embeds.split(LENGTHS, 1)], 1)


def embeddings(model):
    return model.get_input_embeddings()(BATCH["input_ids"])


def penalty_at_the_embeddings(model, outputs):
    embeds = embeddings(model).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(outputs(model, embeds).square().mean(), embeds, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), embeds)[0]


def penalty_under_checkpointing(model, outputs):
    checkpointing(reentrant=False)(model.train())
    return penalty_at_the_embeddings(model, outputs)


def backward_through_a_step(model, outputs):
    """Takes the outer gradient of one inner step, as MAML does, at all weights, by `backward`."""
    weights = list(model.parameters())
    loss = outputs(model, embeddings(model)).square().mean()
    stepped = torch.autograd.grad(loss, weights, create_graph=True)
    sum(each.square().sum() for each in stepped).backward()
    return torch.cat([each.grad.flatten() for each in weights])


def hessian_times_vector(model, outputs):
    embeds = embeddings(model).detach()
    vector = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.functional.hvp(lambda x: outputs(model, x).square().mean(), embeds, vector)[1]


WAYS = [penalty_at_the_embeddings, penalty_under_checkpointing, backward_through_a_step, hessian_times_vector]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_second_derivatives_of_a_packed_row_are_those_of_each_example(implementation, way):
    def make(name):
        return tiny_model(registry().get("llama"), name, initializer_range=0.1, num_hidden_layers=2)

    expected, found = way(make("eager"), alone), way(apply(make(implementation)), packed)
    assert (found - expected).norm() < 2e-5 * expected.norm()
