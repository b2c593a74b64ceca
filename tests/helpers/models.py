"""The models that tests run on, and whether one gives what each example gives alone."""

from __future__ import annotations

import pytest
import torch

from padfree_patch.registry import registry
from padfree_patch.testing import Unavailable, conformance

PATCHES = registry().patches()

MACHINERY = [patch for patch in PATCHES if patch.model_type in ("llama", "mistral", "qwen2")]
"""Architectures on which the machinery is tested."""

DIFFERENT = [
    patch for patch in PATCHES if patch.model_type in ("dbrx", "falcon", "gemma2", "gpt_oss", "llama", "mistral")
]
"""Fused projections, a key bias, softcaps, the ways for any decoder, and none of these: what is tested on more."""


def skip_if_unavailable(make_model) -> None:
    """Skips the test, with upstream's reason, if upstream has no such model in this version or can't run it."""
    try:
        model = make_model()
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(3, 9).unsqueeze(0))
    except Exception as error:
        pytest.skip(f"upstream itself can't run this model: {error!r}")


def assert_exact(model, batch, alone) -> None:
    """Raises AssertionError unless the packed row's logits are those of each example alone."""
    with torch.no_grad():
        error = conformance.largest(model(**batch).logits - alone) / conformance.largest(alone)
    assert error < conformance.LOGIT_TOLERANCE


def seen_by_the_last_token(model, tokens: int = 12) -> int:
    """Counts the tokens that reach the last one, by changing each in turn: no knowledge of masks.

    The model has one layer: a second one would let tokens reach further.
    """
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
        changed = ids.repeat(tokens, 1) + torch.eye(tokens, dtype=torch.int64) * 20
        moved = (model(input_ids=changed).logits[:, -1] != logits).any(-1)
    return int(moved.sum())
