"""The core's promises, on one architecture of each kind that no patch is registered for."""

from __future__ import annotations

import pytest

from helpers.any_decoder import CONFIGS, maker
from padfree_patch.registry import registry
from padfree_patch.testing import CHECKS, checks

pytestmark = pytest.mark.versions

KINDS = [name for name in CONFIGS if registry().get(name) is None]

COVERED = (checks.check_logits, checks.check_isolation)
"""What `apply` itself has measured, and `check_gradients` again."""


def test_most_kinds_have_no_patch():
    assert len(KINDS) >= 5


@pytest.mark.parametrize("check", [each for each in CHECKS if each not in COVERED], ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_found_model_passes(kind, check):
    if kind == "bart" and check is checks.check_gradients:
        pytest.skip("its labels are not shifted: test_labels.py")
    if kind in ("rwkv", "bart") and check is checks.check_two_forwards:
        pytest.skip("test_checkpointing.py")
    check(maker(kind))
