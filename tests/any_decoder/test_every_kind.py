"""The core's promises, on one architecture of each kind, as if no patch were registered for any (conftest.py)."""

from __future__ import annotations

import pytest
import torch

from helpers.any_decoder import CONFIGS, maker
from padfree_patch import PadfreeError, apply
from padfree_patch.testing import CHECKS, checks
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions

KINDS = list(CONFIGS)

COVERED = (checks.check_logits, checks.check_isolation)
"""What `apply` itself has measured, and `check_gradients` again."""


def why_one_token_fails(kind):
    """Says how upstream fails on the shortest example that the checks have (Mamba 2 of 4.47); None if it does not."""
    model = maker(kind)()
    try:
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    except Exception as error:
        return repr(error)[:80]
    return None


@pytest.mark.parametrize("check", [each for each in CHECKS if each not in COVERED], ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_found_model_passes(kind, check):
    if reason := why_one_token_fails(kind):
        pytest.skip(f"upstream fails on an example of one token alone: {reason}")
    if kind == "bart" and check is checks.check_gradients:
        pytest.skip("its labels are not shifted: test_labels.py")
    if check is checks.check_two_forwards:
        if kind in ("rwkv", "bart"):
            pytest.skip("test_checkpointing.py")
        if OptIn.of(apply(maker(kind)())).not_recomputed:  # Mamba before 4.45, whose mixers are handed no mask
            with pytest.raises(PadfreeError, match="gradient checkpointing would run again"):
                check(maker(kind))
            return
    check(maker(kind))
