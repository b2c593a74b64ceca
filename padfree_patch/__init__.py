"""Padding-free training that is exact, on Hugging Face decoders of any transformers version from 4.34 on.

    padfree_patch.apply(model)

Importing this package patches nothing and imports no model code.
"""

from .collators import DataCollatorForCompletionOnlyLM, DataCollatorWithFlattening
from .errors import LeakError, PadfreeError
from .estimation import Estimate, estimate
from .explanation import Explanation, explain
from .packing import PackedSequences
from .patching import applied, apply, restore
from .registry import Patch
from .verification import Verification, verify

__all__ = [
    "DataCollatorForCompletionOnlyLM",
    "DataCollatorWithFlattening",
    "Estimate",
    "Explanation",
    "LeakError",
    "PackedSequences",
    "PadfreeError",
    "Patch",
    "Verification",
    "applied",
    "apply",
    "estimate",
    "explain",
    "restore",
    "verify",
]
