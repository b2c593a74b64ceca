"""Kernels that are told where sequences begin: a process in which transformers finds stand-ins for their packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.integrations

TESTS = Path(__file__).parents[1]
CHECKS = TESTS / "own_process" / "kernels_checks.py"
PATHS = [str(TESTS), str(TESTS / "helpers" / "kernel_stand_ins"), os.environ.get("PYTHONPATH", "")]


@pytest.mark.slow
def test_mixers_with_kernels_are_exact():
    if not hasattr(transformers.integrations, "use_kernel_func_from_hub_with_fallback"):
        pytest.skip("without CUDA this version takes no kernels")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-W", "ignore", str(CHECKS)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
