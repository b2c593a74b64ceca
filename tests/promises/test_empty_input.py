"""Promise 3 for batches and masks of no tokens: what upstream serves is served, what it fails on is an error."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PadfreeError, applied
from padfree_patch.testing import examples

pytestmark = pytest.mark.versions


def outcome(model, call):
    """Returns the logits and the loss, or None if the call fails."""
    try:
        with torch.no_grad():
            result = model(**call, use_cache=False)
    except Exception:
        return None
    return result.logits, result.get("loss")


def assert_as_unpatched(make, call):
    expected = outcome(make(), call)
    with applied(make()) as model:
        if expected is None:
            with pytest.raises(PadfreeError, match=r"empty input, the tokens have shape \(\d, \d\)"):
                model(**call)
            return
        torch.testing.assert_close(outcome(model, call), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("beside", [[], ["attention_mask"], ["position_ids", "attention_mask", "labels"]], ids=str)
def test_batch_without_tokens_is_upstreams(make, shape, beside):
    """Served until 4.42 by Llama, until 4.47 by others, and by none afterwards."""
    assert_as_unpatched(make, dict.fromkeys(["input_ids", *beside], torch.zeros(shape, dtype=torch.int64)))


@pytest.mark.parametrize("shape", [(1, 0), (0, 6), (0, 0)], ids=str)
def test_mask_without_tokens_is_upstreams(make, shape):
    """Upstream's sdpa takes it for none."""
    (tokens,) = examples((6,))
    call = {"input_ids": tokens, "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    expected = outcome(make(), call)
    with applied(make()) as model:
        found = outcome(model, call)
    assert (found is None) == (expected is None)
    if found is not None:
        assert torch.equal(found[0], expected[0])
