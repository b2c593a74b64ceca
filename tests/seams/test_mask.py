"""Windows: read off the mask that upstream would build, whatever the version makes of the configured size."""

from __future__ import annotations

import pytest
import torch

from helpers.models import seen_by_the_last_token, skip_if_unavailable
from padfree_patch import PadfreeError, explain
from padfree_patch.batch.packed_batch import read_batch
from padfree_patch.registry import registry
from padfree_patch.seams import mask
from padfree_patch.seams.stand_in import Recipe, batch_of, is_stand_in, recipe_of, stand_in, with_recipe
from padfree_patch.seams.window import measured
from padfree_patch.testing import tiny_model
from padfree_patch.wrapping.call import Call

pytestmark = pytest.mark.versions


CONFIGS = [
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
]


@pytest.mark.parametrize(("model_type", "config"), CONFIGS, ids=str)
def test_window_is_the_one_that_the_loaded_model_has(model_type, config, implementation):
    def make(layers):
        return tiny_model(registry().get(model_type), implementation, num_hidden_layers=layers, **config)

    skip_if_unavailable(lambda: make(1))
    one = {**config, "max_window_layers": 0} if config.get("max_window_layers") else config
    model = tiny_model(registry().get(model_type), implementation, num_hidden_layers=1, **one)
    (window,) = explain(model).windows
    seen = seen_by_the_last_token(model)
    assert window == (seen if seen < 12 else 0)


def test_stand_in_carries_the_batch_and_the_recipe():
    batch = read_batch(
        (1, 6), torch.device("cpu"), position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), attention_mask=None, lengths={}
    )
    mask = with_recipe(stand_in(batch), Recipe(window=7))
    for seen in (mask, mask.detach()):
        assert is_stand_in(seen)
        assert recipe_of(seen) == Recipe(window=7)
        assert batch_of(seen, (1, 6), torch.device("cpu")) is batch
    rebuilt = batch_of(mask.clone(), (1, 6), torch.device("cpu"))
    assert rebuilt is not batch
    assert rebuilt.sequences == batch.sequences


def test_no_mask_of_upstream_passes_for_the_stand_in():
    video, integers = torch.ones(1, 1, 3, 1, 3), torch.ones(1, 2, 3, 1, 3, dtype=torch.int32)
    for other in (None, torch.ones(1, 3), torch.ones(1, 1, 3, 3), video, integers, {"full_attention": None}):
        assert not is_stand_in(other)


@pytest.mark.parametrize("heads", range(1, 9))
@pytest.mark.parametrize("lengths", [(1, 1), (1, 2), (2, 1, 1), (1, 1, 1, 1), (5, 1), (3, 3, 2)], ids=str)
def test_stand_in_fits_no_scores(lengths, heads):
    """Code that nobody answers for must fail on it, not add it in silence."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = positions.shape[1]
    batch = read_batch((1, tokens), torch.device("cpu"), position_ids=positions, attention_mask=None, lengths={})
    for window in (0, heads - 1, tokens - 1):
        mask = stand_in(batch, Recipe(window))
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.zeros(1, heads, tokens, tokens) + mask
        assert batch_of(mask.clone(), (1, tokens), torch.device("cpu")).sequences.lengths == lengths


class Config:
    sliding_window = 5


def builder_call(builder, config):
    return Call(builder, (config, stand_in_of_nothing()), {})


def stand_in_of_nothing():
    return torch.zeros(1, 1, 1, 1, 2, dtype=torch.int32)


def test_mask_that_is_no_window_is_refused():
    def builds_something_else(config, attention_mask):
        return torch.ones(1, 1, 8, 8, dtype=torch.bool)  # bidirectional

    with pytest.raises(PadfreeError, match="builds no causal sliding window"):
        mask.answer(builder_call(builds_something_else, Config()))


def test_measured_windows_are_bounded():
    """A process that goes through many configurations keeps only the newest."""

    def builds_a_window(config, attention_mask):
        position = torch.arange(8)
        distance = position[:, None] - position
        return ((distance >= 0) & (distance < config.sliding_window))[None, None]

    for window in range(5, 305):
        config = Config()
        config.sliding_window = window
        assert recipe_of(mask.answer(builder_call(builds_a_window, config))) == Recipe(window)
    assert len(measured) <= 128
