"""Padding-free training that is exact, on Hugging Face decoders of any transformers version from 4.34 on.

    padfree_patch.apply(model)

Importing this package patches nothing and imports no model code.
"""

from typing import TYPE_CHECKING, Any

from .batch.sequences import PackedSequences
from .binning import PackingPlan, plan_packing
from .collators import DataCollatorForCompletionOnlyLM, DataCollatorWithFlattening
from .dataset import pack_dataset
from .errors import LeakError, PadfreeError
from .estimation import Estimate, estimate
from .patching import applied, apply, restore
from .patching.explanation import Explanation, explain
from .preference import DataCollatorForPreference
from .registry import Patch
from .samplers import TokenBudgetBatchSampler
from .unpacking import last_tokens, sequence_log_probs, unpack
from .verification import Verification, verify

if TYPE_CHECKING:
    from .callback import PaddingFreeCallback

__all__ = [
    "DataCollatorForCompletionOnlyLM",
    "DataCollatorForPreference",
    "DataCollatorWithFlattening",
    "Estimate",
    "Explanation",
    "LeakError",
    "PackedSequences",
    "PackingPlan",
    "PaddingFreeCallback",
    "PadfreeError",
    "Patch",
    "TokenBudgetBatchSampler",
    "Verification",
    "applied",
    "apply",
    "estimate",
    "explain",
    "last_tokens",
    "pack_dataset",
    "plan_packing",
    "restore",
    "sequence_log_probs",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Loads the callback when it is asked for: its base class imports the Trainer's arguments, and those much more."""
    if name == "PaddingFreeCallback":
        from .callback import PaddingFreeCallback

        return PaddingFreeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
