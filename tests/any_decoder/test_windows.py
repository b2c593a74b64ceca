"""Windows, chunks and counted positions longer than the row that verify looks at: nothing of them shows there."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.any_decoder import maker
from helpers.models import assert_exact
from padfree_patch.any_decoder.measured import Builder
from padfree_patch.testing import conformance, examples, pack

pytestmark = pytest.mark.versions

LENGTHS = (60, 20, 45)

LONG = {
    "gpt_oss": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24},
    "llama4_text": {"attention_chunk_size": 32, "floor_scale": 30},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", LONG)
def test_rows_longer_than_the_window_are_exact(kind, implementation):
    if (kind, implementation) == ("gpt_oss", "sdpa"):
        implementation = None
    make = maker(kind, implementation, **LONG[kind])
    texts = examples(LENGTHS)
    alone = conformance.logits_alone(make, texts)
    wider = {name: 4 * value for name, value in LONG[kind].items()}
    other = conformance.logits_alone(maker(kind, implementation, **wider), texts)
    assert conformance.largest(other - alone) > 1e-3  # the control: the window shows in these rows
    assert_exact(padfree_patch.apply(make()), pack(texts), alone)


class Config:
    """Says how far a query sees under a name that nobody knows."""

    reach, heads = 4096, 6

    def to_dict(self):
        return {}

    def get_text_config(self):
        return self


def built(config, inputs_embeds, attention_mask=None):
    position = torch.arange(inputs_embeds.shape[1])
    distance = position[:, None] - position
    reach = config.get_text_config().reach
    return ((distance >= 0) & (distance < reach))[None, None]


def built_causal(config, inputs_embeds, attention_mask=None):
    assert config.heads
    return built(type("Far", (Config,), {"reach": 10**6})(), inputs_embeds)


@pytest.mark.parametrize(("function", "kind"), [(built, ("window", 4096)), (built_causal, ("causal", 0))])
def test_window_of_any_name_is_measured(function, kind):
    """It is as causal as the other in a short mask: what the builder reads decides, not what it is called."""
    builder = Builder(function, {"config": Config(), "inputs_embeds": None}, torch.float32, False)
    short = builder.build(17, torch.device("cpu"))
    assert torch.equal(short, torch.ones_like(short).tril())
    recipe = builder.recipe()
    assert (recipe.kind, recipe.size) == kind
