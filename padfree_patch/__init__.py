"""Padding-free training that is exact, on Hugging Face decoders of any transformers version from 4.34 on.

    padfree_patch.apply(model)

Importing this package patches nothing and imports no model code.
"""

from typing import TYPE_CHECKING

from .batch.sequences import PackedSequences
from .data.completions import DataCollatorForCompletionOnlyLM
from .data.dataset import pack_dataset
from .data.flattening import DataCollatorWithFlattening
from .data.packing_plan import PackingPlan, plan_packing
from .data.preference import DataCollatorForPreference
from .data.samplers import TokenBudgetBatchSampler
from .data.unpacking import last_tokens, sequence_log_probs, unpack
from .errors import LeakError, PadfreeError
from .measure.estimation import Estimate, estimate
from .patching import applied, apply, restore
from .patching.explanation import Explanation, explain
from .registry import AttentionCall, Patch
from .verification import Verification, verify

if TYPE_CHECKING:
    from .integrations.trainer import PaddingFreeCallback

__all__ = [
    "AttentionCall",
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


def __getattr__(name: str) -> object:
    """Loads the callback when it is asked for: its base class is in a module that imports the Trainer's arguments."""
    if name == "PaddingFreeCallback":
        from .integrations.trainer import PaddingFreeCallback

        return PaddingFreeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
