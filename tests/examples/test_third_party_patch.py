"""examples/third_party_patch is a package that works once it is installed, and only then."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from padfree_patch import apply, verify
from padfree_patch.patching import way_of
from padfree_patch.testing import CHECKS, TINY

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_patch"
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Where a copy of the example's sources is, and where its wheel was installed; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("third_party")
    source = Path(shutil.copytree(EXAMPLE, folder / "source"))
    run("-W", "ignore", "-c", BUILD, str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    installed = folder / "installed"
    zipfile.ZipFile(wheel).extractall(installed)  # all that an installer does with a wheel of pure Python
    (source / "padfree_persimmon.py").unlink()  # so that the tests import what was installed
    return source, installed


def run(*arguments: str, cwd: Path, installed: str = "") -> str:
    """Runs Python in `cwd`, with the packages in `installed` beside those of this environment."""
    environment = {**os.environ, "PYTHONPATH": installed}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_installed_package_passes_its_own_tests(folders):
    source, installed = folders
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=source, installed=str(installed))
    passed = int(re.search(r"(\d+) passed", output).group(1))
    assert passed >= 2 * len(CHECKS), output  # default and variant, on eager at least; sdpa where upstream has it


def test_without_the_package_apply_finds_a_way_itself():
    """The control: upstream mixes the examples, and no patch says how not to."""
    config = CONFIG_MAPPING["persimmon"](**TINY)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not verify(model)
    assert way_of(apply(model)) and verify(model)
