"""Importing the package is cheap: names are loaded when they are used, and no modeling file is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import padfree_patch

NAMES = [name for name in padfree_patch.__all__ if name != "__version__"]


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.versions
def test_using_public_names_imports_no_model_code():
    """Except the callback: its base class is in a module that imports the Trainer's arguments."""
    names = ", ".join(name for name in NAMES if name != "PaddingFreeCallback")
    program = f"from padfree_patch import {names}; import sys; print(*(m for m in sys.modules if '.models.' in m))"
    assert run(program).split() == []


def test_importing_the_package_imports_no_torch_and_takes_no_time():
    program = """
import sys, time
start = time.process_time()
import padfree_patch
print(time.process_time() - start, *({"torch", "transformers", "numpy"} & set(sys.modules)))
padfree_patch.apply
print("torch" in sys.modules)  # the control
"""
    first, control = run(program).splitlines()
    seconds, *imported = first.split()
    assert float(seconds) < 0.15
    assert imported == []
    assert control == "True"


def imports_for_type_checkers() -> dict[str, str]:
    """The module of each name that __init__ imports under TYPE_CHECKING."""
    tree = ast.parse(Path(padfree_patch.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level and node.module]
    return {alias.name: f"padfree_patch.{node.module}" for node in nodes for alias in node.names}


def test_running_code_and_type_checkers_find_the_same_names():
    of_checkers = imports_for_type_checkers()
    assert sorted(of_checkers) == NAMES
    for name, module in of_checkers.items():
        assert getattr(padfree_patch, name) is getattr(sys.modules[module], name)


def test_every_public_name_is_in_dir():
    assert set(padfree_patch.__all__) <= set(dir(padfree_patch))


def test_version_is_that_of_the_distribution():
    assert padfree_patch.__version__ == version("padfree_patch")
