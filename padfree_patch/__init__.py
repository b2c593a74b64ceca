"""Padding-free training that is exact, on Hugging Face decoders of any transformers version from 4.34 on.

    padfree_patch.apply(model)

Importing this package patches nothing, and imports neither torch nor transformers: a name is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import attention as attention
    from . import testing as testing
    from .batch.sequences import PackedSequences
    from .data.classification import DataCollatorForSequenceClassification
    from .data.completions import DataCollatorForCompletionOnlyLM
    from .data.dataset import pack_dataset
    from .data.flattening import DataCollatorWithFlattening
    from .data.packing_plan import PackingPlan, plan_packing
    from .data.preference import DataCollatorForPreference
    from .data.samplers import TokenBudgetBatchSampler
    from .data.unpacking import last_tokens, sequence_log_probs, unpack
    from .door.hooks import Autopatch, autopatch
    from .errors import LeakError, PadfreeError
    from .integrations.per_example import PerExampleMetrics
    from .integrations.trainer import PaddingFreeCallback
    from .measure.estimation import Estimate, estimate
    from .patching import applied, apply, restore
    from .patching.explanation import Explanation, explain
    from .registry import AttentionCall, Patch
    from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AttentionCall",
    "Autopatch",
    "DataCollatorForCompletionOnlyLM",
    "DataCollatorForPreference",
    "DataCollatorForSequenceClassification",
    "DataCollatorWithFlattening",
    "Estimate",
    "Explanation",
    "LeakError",
    "PackedSequences",
    "PackingPlan",
    "PaddingFreeCallback",
    "PadfreeError",
    "Patch",
    "PerExampleMetrics",
    "TokenBudgetBatchSampler",
    "Verification",
    "__version__",
    "applied",
    "apply",
    "autopatch",
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

_NAMES = {
    "batch.sequences": ("PackedSequences",),
    "data.classification": ("DataCollatorForSequenceClassification",),
    "data.completions": ("DataCollatorForCompletionOnlyLM",),
    "data.dataset": ("pack_dataset",),
    "data.flattening": ("DataCollatorWithFlattening",),
    "data.packing_plan": ("PackingPlan", "plan_packing"),
    "data.preference": ("DataCollatorForPreference",),
    "data.samplers": ("TokenBudgetBatchSampler",),
    "data.unpacking": ("last_tokens", "sequence_log_probs", "unpack"),
    "door.hooks": ("Autopatch", "autopatch"),
    "errors": ("LeakError", "PadfreeError"),
    "integrations.per_example": ("PerExampleMetrics",),
    "integrations.trainer": ("PaddingFreeCallback",),
    "measure.estimation": ("Estimate", "estimate"),
    "patching": ("applied", "apply", "restore"),
    "patching.explanation": ("Explanation", "explain"),
    "registry": ("AttentionCall", "Patch"),
    "verification": ("Verification", "verify"),
}
"""The public names of each module: what type checkers read above, for running code."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_SUBPACKAGES = ("attention", "testing")
"""Those that the documentation reaches through this module."""


def __getattr__(name: str) -> object:
    """Loads a public name when it is first used; from then on it is an attribute like any other."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
