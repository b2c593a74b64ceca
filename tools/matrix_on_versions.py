"""Runs a script of tools/ on many transformers, two at a time, each in an environment of its own.

`nox -s matrix`, `eras`, `breadth` and `ways` call it:

python tools/matrix_on_versions.py --merge [TRANSFORMERS VERSION...]     all checks; with --only=A,B, of new patches
python tools/matrix_on_versions.py --compare                             quickly, on the ends of each era
python tools/matrix_on_versions.py --breadth [TRANSFORMERS VERSION...]   every decoder, any patch or none
python tools/matrix_on_versions.py --ways [TRANSFORMERS VERSION...]      what upstream does unpatched, by way of calling

Without versions --merge and --ways take every minor, --breadth six. The package is the wheel that is built first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pins import TORCH

FOLDER = Path(".nox", "matrix").resolve()
VERDICTS = FOLDER / "verdicts"
UV = str(Path(sys.executable).with_name("uv"))  # beside nox, which need not be on PATH
HELPERS = os.pathsep.join(["tests", "tests/helpers/stand_ins"])
ENVIRONMENT = {**os.environ, "PYTHONPATH": HELPERS, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# fmt: off
LAST_PATCHES = [
    "4.34.1", "4.35.2", "4.36.2", "4.37.2", "4.38.2", "4.39.3", "4.40.2", "4.41.2", "4.42.4", "4.43.4", "4.44.2",
    "4.45.2", "4.46.3", "4.47.1", "4.48.3", "4.49.0", "4.50.3", "4.51.3", "4.52.4", "4.53.3", "4.54.1", "4.55.4",
    "4.56.2", "4.57.6", "5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0",
    "5.10.4", "5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2",
    "5.21.1", "5.22.2", "5.23.0", "5.24.0",
]
# fmt: on
"""The last patch release of every transformers minor."""

FIRST_OF_ERA = ["4.36.2", "4.38.2", "4.43.4", "4.48.3", "4.53.3", "5.10.4"]
LAST_OF_ERA = ["4.34.1", "4.35.2", "4.37.2", "4.42.4", "4.47.1", "4.52.4", "4.57.6", "5.0.0", "5.24.0"]
"""Where transformers changed how attention is reached: the first and the last version of each way.

Variants are compared on the last ones only: what an era adds to a way of reaching attention stays until its end.
"""

OF_BREADTH = ["4.36.2", "4.41.2", "4.48.3", "4.53.3", "4.57.6", "5.24.0"]


def python_of(version: str) -> str:
    return str(FOLDER / version / "bin" / "python")


def built_wheel() -> Path:
    """Builds the package's wheel, and empties the folder of the verdicts."""
    shutil.rmtree(VERDICTS, ignore_errors=True)
    VERDICTS.mkdir(parents=True)
    subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", str(FOLDER)], check=True)
    (wheel,) = FOLDER.glob("*.whl")
    return wheel


def run(version: str, packages: list[str], script: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Makes an environment and collects what a script of tools/ finds on one version; ends at the first failure."""
    tool, *options = script
    steps = [
        [UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(FOLDER / version)],
        [UV, "pip", "install", "--quiet", "--python", python_of(version), f"transformers=={version}", *packages],
        [python_of(version), tool, str(VERDICTS / f"{version}.json"), *options],
    ]
    for step in steps:
        done = subprocess.run(step, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        if done.returncode:
            break
    return done


def scripts_of(what_then: str, chosen: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the script to run on each version, with its option."""
    if what_then == "--ways":
        return dict.fromkeys(chosen or LAST_PATCHES, ("tools/upstream_ways.py",))
    if what_then == "--breadth":
        return dict.fromkeys(chosen or OF_BREADTH, ("tools/breadth.py",))
    if what_then == "--merge":
        options = [each for each in chosen if each.startswith("--only=")]
        named = [each for each in chosen if each not in options]
        return dict.fromkeys(named or LAST_PATCHES, ("tools/matrix.py", "--natively", *options))
    quick, defaults = ("tools/matrix.py", "--quick"), ("tools/matrix.py", "--defaults")
    return {**dict.fromkeys(LAST_OF_ERA, quick), **dict.fromkeys(FIRST_OF_ERA, defaults)}


def main(what_then: str, *chosen: str) -> None:
    """Prints what came of each version, and merges or compares all."""
    scripts = scripts_of(what_then, chosen)
    beside = {version: [TORCH, "numpy<2" if version.startswith("4") else "numpy"] for version in scripts}
    wheel = str(built_wheel())
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {
            version: pool.submit(run, version, [*more, wheel], scripts[version]) for version, more in beside.items()
        }
        outcomes = {version: future.result() for version, future in futures.items()}
    for version, outcome in outcomes.items():
        print(f"{version}: {outcome.stdout.strip()}")
    python = python_of(next(iter(scripts)))
    subprocess.run([python, "tools/matrix.py", what_then, str(VERDICTS)], check=True, env=ENVIRONMENT)
    if any(outcome.returncode for outcome in outcomes.values()):
        sys.exit("not every version passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
