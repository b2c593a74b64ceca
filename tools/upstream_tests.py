"""Runs transformers' own model tests without and with `apply`, and compares them test by test; `nox -s upstream`.

python tools/upstream_tests.py CHECKOUT [--page] [PYTEST OPTION...]    the models that there are patches for, or the
                                                                       paths given; --page adds them to the docs
python tools/upstream_tests.py --needs CHECKOUT FOLDER                 what to install, maybe a copy in FOLDER

CHECKOUT is a clone of https://github.com/huggingface/transformers at the tag of the installed version, or at a commit
from which transformers was installed. Exits with 0 if every test that passes without passes with, 1 if not, and 2 if
nothing could be compared.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from packaging.version import Version

import upstream_page
from padfree_patch import versions
from padfree_patch.registry import registry

Outcomes = dict[str, dict[str, Any]]
"""Test -> the fields of `upstream_plugin.Outcome`."""

NOT_COMPARED = 2


def main(checkout: Path, options: list[str]) -> int:
    """Returns the exit status."""
    check_version(checkout)
    write_page, options = "--page" in options, [each for each in options if each != "--page"]
    paths = [each for each in options if is_path(checkout, each)]
    options = [each for each in options if each not in paths]
    run = [*options, *(paths or tests_of_patches(checkout))]
    without, with_apply = outcomes_of(checkout, run), outcomes_of(checkout, ["--apply", *run])
    broken = broken_by_apply(without, with_apply)
    print("\n".join(report(without, with_apply, broken)))
    if write_page:
        found = upstream_page.count(without, with_apply, broken)
        upstream_page.update(version_of(checkout), about(checkout, options), found)
    if broken:
        return 1
    return 0 if models_applied(without, with_apply) else NOT_COMPARED


def version_of(checkout: Path) -> str:
    file = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', file.read_text(), re.MULTILINE) if file.exists() else None
    if found is None:
        stop(f"{checkout}: expected a checkout of transformers, found no __version__ in src/transformers/__init__.py")
    return found[1]


def check_version(checkout: Path) -> None:
    installed, found = versions.transformers_version().public, version_of(checkout)
    if found != installed:
        stop(f"{checkout} is transformers {found}, installed is {installed}; `git checkout v{installed}` there")


def needs(checkout: Path, folder: Path) -> list[str]:
    """Returns the version, and what to install for its tests: transformers, and the pytest that they were made for.

    No index has a development version: that is installed from a copy in the folder, since whoever builds a package
    writes into what it is built from.
    """
    version = version_of(checkout)
    found = re.search(r'"(pytest[<>=][^"]*)"', (checkout / "setup.py").read_text())
    pytest = found[1] if found else "pytest"
    if "<" not in pytest:  # pytest 8 lacks what conftest.py of 4.36 imports; the docs' figures are from 8 or before
        pytest += f"{',' if found else ''}<{8 if Version(version) < Version('4.39') else 9}"
    package = copy_of(checkout, folder) if Version(version).is_devrelease else f"transformers=={version}"
    return [version, package, pytest]


def copy_of(checkout: Path, folder: Path) -> str:
    not_needed = shutil.ignore_patterns(".git", "tests", "docs")
    return str(shutil.copytree(checkout, folder / "transformers", ignore=not_needed))


def is_path(checkout: Path, option: str) -> bool:
    return not option.startswith("-") and (checkout / option.split("::")[0]).exists()


def about(checkout: Path, options: Sequence[str]) -> dict[str, str]:
    """Returns what figures depend on."""
    git = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if (checkout / ".git").exists() else ""
    return {"commit": commit, "torch": torch.__version__, "options": shlex.join(options)}


def tests_of_patches(checkout: Path) -> list[str]:
    """Returns the test files of the architectures that there are patches for, as far as the version has them."""
    names = [f"tests/models/{each}/test_modeling_{each}.py" for each in registry().model_types()]
    if not (found := [name for name in names if (checkout / name).exists()]):
        stop(f"{checkout} has none of {', '.join(names)}")
    return found


def outcomes_of(checkout: Path, options: Sequence[str]) -> Outcomes:
    """Runs pytest in the checkout, in which it writes nothing."""
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        plugins = ["-p", "upstream_plugin", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *plugins, "--outcomes", str(file), "-q", "--tb=no", *options]
        status = subprocess.run(command, cwd=checkout, env=environment).returncode
        if status not in (0, 1) or not file.exists():  # 1: tests failed
            stop(f"pytest ended with {status}, see above: {' '.join(command)}")
        return json.loads(file.read_text())


def broken_by_apply(without: Outcomes, with_apply: Outcomes) -> dict[str, str]:
    """Returns the tests that pass without and do not pass with, and what came of them instead."""
    return {
        test: describe(with_apply.get(test))
        for test, found in without.items()
        if found["outcome"] == "passed" and with_apply.get(test, {}).get("outcome") != "passed"
    }


def describe(found: dict[str, Any] | None) -> str:
    return f"{found['outcome']}: {found['error']}" if found else "did not run"


def models_applied(without: Outcomes, with_apply: Outcomes) -> int:
    """Returns on how many models `apply` was called in tests that pass without it."""
    return sum(found["applied"] for test, found in with_apply.items() if passes(without, test))


def passes(outcomes: Outcomes, test: str) -> bool:
    return outcomes.get(test, {}).get("outcome") == "passed"


def report(without: Outcomes, with_apply: Outcomes, broken: dict[str, str]) -> list[str]:
    counts = Counter(found["outcome"] for found in without.values())
    touched = sum(passes(without, test) and found["applied"] > 0 for test, found in with_apply.items())
    refused = Counter(reason for found in with_apply.values() for reason in found["refused"])
    return [
        "",
        f"transformers {versions.transformers_version()}: {len(without)} tests without apply: {counts['passed']} pass, "
        f"{counts['failed']} fail, {counts['skipped']} are skipped",
        f"with apply: {counts['passed'] - len(broken)} of the {counts['passed']} pass; {touched} of them build models "
        f"that it takes, {models_applied(without, with_apply)} in all",
        *(f"apply refused {count} times: {reason}" for reason, count in refused.most_common()),
        *(f"BROKEN {test}\n    {what}" for test, what in broken.items()),
    ]


def stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(NOT_COMPARED)


if __name__ == "__main__":
    if sys.argv[1] == "--needs":
        print(*needs(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
