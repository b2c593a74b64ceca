"""Methods of PEFT on the benches of tools/peft_methods.py, for tests of them."""

from __future__ import annotations

import peft
import pytest

from peft_methods import Bench, methods


def bench_or_skip(name: str) -> Bench:
    """Skips the test if the installed PEFT does not have the method."""
    if name not in methods():
        pytest.skip(f"peft {peft.__version__} has no {name}")
    return Bench(name, methods()[name], num_key_value_heads=6)  # PEFT's older methods take no grouped queries
