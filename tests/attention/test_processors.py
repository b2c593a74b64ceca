"""Attention on the CPU is exact on older processors too: their instruction sets are forced in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).with_name("test_sdpa.py")
HALF = "half_precision and 1.5 and not softcap or scores_are_not_rounded"
LAYOUT = "neighbours or layout"
"""Tests of test_sdpa.py; what the instruction set decides is how they round, and which kernels they take."""

CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


def environment(instructions: str, threads: int) -> dict[str, str]:
    """ATen's and oneDNN's dispatch bounded to AVX2, or ATen's to none; a processor that has less takes what it has."""
    onednn = {"avx2": "AVX2", "default": "SSE41"}[instructions]
    forced = {"ATEN_CPU_CAPABILITY": instructions, "ONEDNN_MAX_CPU_ISA": onednn}
    return {**os.environ, **forced, "OMP_NUM_THREADS": str(threads), "PADFREE_TEST_THREADS": str(threads)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instructions", "threads", "chosen"), [("avx2", 1, HALF), ("avx2", 3, LAYOUT), ("default", 1, LAYOUT)]
)
def test_attention_is_exact_on_older_instruction_sets(instructions, threads, chosen):
    forced = environment(instructions, threads)
    found = subprocess.run([sys.executable, "-c", CAPABILITY], env=forced, capture_output=True, text=True, check=True)
    assert found.stdout.strip() in ({"avx2": ("AVX2", "DEFAULT"), "default": ("DEFAULT",)}[instructions])
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-k", chosen, str(TESTS)]
    done = subprocess.run(command, env=forced, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
