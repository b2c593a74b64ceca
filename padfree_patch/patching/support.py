"""What was tested where: support.json, which `nox -s matrix` writes beside docs/support.md (`tools/matrix.py`).

An entry says "exact" (every check of `padfree_patch.testing.CHECKS` passed, on every variant), "native-exact" (on the
unpatched model too), "refused", "wrong", "upstream fails" (it has the model but can't run it) or "absent".
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

FILE = Path(__file__).with_name("support.json")

Table = dict[str, dict[str, dict[str, str]]]


@functools.cache
def table() -> Table:
    """Reads the table: version -> model type -> attention implementation -> one word for all variants."""
    found: Table = json.loads(FILE.read_text())
    return found


def status(version: str, model_type: str, implementation: str) -> str:
    """Returns what the table says of a model; "untested" if it is not in it."""
    return table().get(version, {}).get(model_type, {}).get(implementation, "untested")
