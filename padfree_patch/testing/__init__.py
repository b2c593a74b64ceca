"""What a test of a patch needs: tiny models, packed batches, the checks that a patched model passes, and counters.

A third party's patch is tested by the same checks as ours:

    @pytest.mark.parametrize("check", padfree_patch.testing.CHECKS, ids=lambda check: check.__name__)
    def test_my_patch(check):
        check(lambda: padfree_patch.testing.tiny_model(PATCH, "sdpa"))

    @pytest.mark.parametrize("check", padfree_patch.testing.FAIL_UNPATCHED, ids=lambda check: check.__name__)
    def test_without_my_patch(check):
        with pytest.raises(AssertionError):
            check(lambda: padfree_patch.testing.tiny_model(PATCH, "sdpa"), patched=False)
"""

from .checks import CHECKS, FAIL_UNPATCHED
from .counters import LargestTensor, SyncCounter
from .models import TINY, Unavailable, UpstreamFails, checkpointing, examples, pack, pad, tiny_model

__all__ = [
    "CHECKS",
    "FAIL_UNPATCHED",
    "TINY",
    "LargestTensor",
    "SyncCounter",
    "Unavailable",
    "UpstreamFails",
    "checkpointing",
    "examples",
    "pack",
    "pad",
    "tiny_model",
]
