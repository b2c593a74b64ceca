"""Windows: read off the mask that upstream would build, whatever the version makes of the configured size."""

from __future__ import annotations

import pytest
import torch
from conftest import skip_if_unavailable

from padfree_patch import PadfreeError, explain, masks
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model

pytestmark = pytest.mark.versions


CONFIGS = [
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
]


def seen_by_the_last_token(model, tokens: int = 12) -> int:
    """Tokens that reach the last one through a model of one layer, by changing each in turn: no knowledge of masks."""
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
        changed = ids.repeat(tokens, 1) + torch.eye(tokens, dtype=torch.int64) * 20
        moved = (model(input_ids=changed).logits[:, -1] != logits).any(-1)
    return int(moved.sum())


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


def test_packed_mask_cannot_be_mistaken():
    mask = masks.packed_mask(window=7)
    assert masks.is_packed_mask(mask)
    assert masks.is_packed_mask(mask.detach())
    assert masks.window_of(mask) == 7
    for other in (None, torch.ones(1, 3), torch.ones(1, 1, 3, 3), {"full_attention": None}):
        assert not masks.is_packed_mask(other)


def test_mask_that_is_no_window_is_refused():
    def builds_something_else(config, attention_mask):
        return torch.ones(1, 1, 8, 8, dtype=torch.bool)  # bidirectional

    class Config:
        sliding_window = 5

    with pytest.raises(PadfreeError, match="builds no causal sliding window"):
        masks.build_mask(builds_something_else, (Config(), masks.packed_mask()), {})
