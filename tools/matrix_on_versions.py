"""Runs tools/matrix.py on many transformers, two at a time, each in an environment of its own; `nox -s matrix`, `eras`.

python tools/matrix_on_versions.py '{"4.36.2": ["torch==2.13.0", "numpy<2"], ...}' --merge|--compare [OPTION...]

For each version, what is installed beside it. The package is the wheel that is built first, not the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(".nox", "matrix").resolve()
UV = str(Path(sys.executable).with_name("uv"))  # beside nox, which need not be on PATH
HELPERS = os.pathsep.join(["tests", "tests/helpers/stand_ins"])
ENVIRONMENT = {**os.environ, "PYTHONPATH": HELPERS, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def python_of(version: str) -> str:
    return str(FOLDER / version / "bin" / "python")


def built_wheel() -> Path:
    """Builds the package's wheel, and empties the folder of the verdicts."""
    shutil.rmtree(FOLDER / "verdicts", ignore_errors=True)
    (FOLDER / "verdicts").mkdir(parents=True)
    subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", str(FOLDER)], check=True)
    (wheel,) = FOLDER.glob("*.whl")
    return wheel


def run(version: str, packages: list[str], options: list[str]) -> subprocess.CompletedProcess[str]:
    """Makes an environment and collects the verdicts on one version in it; ends at the first step that fails."""
    verdicts = str(FOLDER / "verdicts" / f"{version}.json")
    steps = [
        [UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(FOLDER / version)],
        [UV, "pip", "install", "--quiet", "--python", python_of(version), f"transformers=={version}", *packages],
        [python_of(version), "tools/matrix.py", verdicts, *options],
    ]
    for step in steps:
        done = subprocess.run(step, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        if done.returncode:
            break
    return done


def main(beside: dict[str, list[str]], what_then: str, options: list[str]) -> None:
    """Prints what came of each version, and merges or compares all."""
    wheel = str(built_wheel())
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {version: pool.submit(run, version, [*more, wheel], options) for version, more in beside.items()}
        outcomes = {version: future.result() for version, future in futures.items()}
    for version, outcome in outcomes.items():
        print(f"{version}: {outcome.stdout.strip()}")
    python = python_of(next(iter(beside)))
    subprocess.run([python, "tools/matrix.py", what_then, str(FOLDER / "verdicts")], check=True, env=ENVIRONMENT)
    if any(outcome.returncode for outcome in outcomes.values()):
        sys.exit("not every version passed")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
