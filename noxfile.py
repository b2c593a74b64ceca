"""What `make test`, `check` and `demo` run. One version alone: .venv/bin/nox -s "tests(4.41.2)" -- -k leak -n 0."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

sys.path.append(str(Path(__file__).parent / "tools"))
import uv_places
from pins import (
    BESIDE,
    BITSANDBYTES,
    DOCS,
    FLASH_ATTN,
    FLASH_ATTN_ON_CPU,
    TORCH,
    TRL,
    TWINE,
    TWO_PROCESSES,
    VERSIONS,
    WHOLE,
    WITHOUT_SLOW,
    pins,
)
from session_times import timed

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.tags = ["ci"]  # what `make test` runs

uv_places.prepare()
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is set, every process would compile torch anew, for seconds

full_asked_for = False

DISTRIBUTED = "tests/promises/test_distributed.py"
NEWEST_ONLY = ["tests/attention", "tests/tools", "tests/examples"]  # long; any version would do
OF_SDIST = ["tests/test_layout.py", "tests/test_registry.py", "tests/docs/test_links.py"]
OWN_PROCESS = Path("tests", "own_process")
"""Tests that want a process of their own, or a library that the others do without."""
# One thread per process: the models are too small for torch to fill two cores with one process.
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STAND_INS = "tests/helpers/stand_ins"  # in place of flash-attn, for whoever has this folder on PYTHONPATH


@nox.session(tags=["ci"])
@timed
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    session.install("-e", ".[dev]", *pins("4.57.6"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(tags=["ci"])
@timed
def wheel(session: nox.Session) -> None:
    """The built package works without the repository: wheel_check.py and some tests of the sdist, elsewhere."""
    check = (OWN_PROCESS / "wheel_check.py").resolve()
    session.install(TWINE)
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        # The sdist, and the wheel from it: a file that either lacks shows, and no stale build/ gets in.
        session.run("uv", "build", "--quiet", "--out-dir", folder)
        session.run("twine", "check", "--strict", *map(str, away.glob("padfree_patch*")))
        session.run("uv", "venv", "--quiet", "--python", sys.executable, str(away / "venv"))
        python = str(away / "venv" / "bin" / "python")
        packages = [*map(str, away.glob("*.whl")), TORCH, f"transformers=={VERSIONS[-1]}"]
        session.run("uv", "pip", "install", "--quiet", "--python", python, *packages)
        with session.chdir(away):
            session.run(python, "-I", str(check), external=True)  # -I: nothing else on sys.path
        (sdist,) = away.glob("*.tar.gz")
        shutil.unpack_archive(sdist, away, filter="data")
        session.run("uv", "pip", "install", "--quiet", "--python", python, *(f"{each}[test]" for each in packages[:1]))
        with session.chdir(away / sdist.name.removesuffix(".tar.gz")):
            session.run(python, "-I", "-m", "pytest", "-q", *OF_SDIST, external=True, env=ALONE)


@nox.session
@nox.parametrize("transformers", [nox.param(each, id=each, tags=["ci"] * (each != "4.43.4")) for each in VERSIONS])
@timed
def tests(session: nox.Session, transformers: str) -> None:
    """The test suite, and the examples in docstrings, on one transformers version."""
    session.install("-e", ".[test]", *pins(transformers))
    report = Path(session.virtualenv.location) / "junit.xml"
    two_processes = [] if transformers in TWO_PROCESSES or full_asked_for else [f"--ignore={DISTRIBUTED}"]
    elsewhere = ["tests/demo"] if transformers == VERSIONS[-1] else NEWEST_ONLY  # the demo installs an old version
    chosen = [] if transformers == VERSIONS[-1] or full_asked_for else ["-m", "not fuzz"]
    if transformers not in WHOLE and not full_asked_for and not session.posargs:
        chosen = ["-m", "versions and not slow" if transformers in WITHOUT_SLOW else "versions"]
    ignored = [f"--ignore={path}" for path in elsewhere if not full_asked_for]
    arguments = [f"--junitxml={report}", *two_processes, *ignored, *chosen, *session.posargs]
    session.run("pytest", "-n2", "--dist=loadgroup", *arguments, env=ALONE)
    if not session.posargs:  # a process of its own, in which transformers finds flash-attn, or what stands in for it
        stand_in = {**ALONE, "PYTHONPATH": STAND_INS, "PADFREE_FLASH_ATTENTION": "1"}
        report = report.with_name("junit-flash_attention_2.xml")
        checks = str(OWN_PROCESS / "flash_attention_2_checks.py")
        session.run("pytest", "-n2", f"--junitxml={report}", checks, env=stand_in)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Everything on everything, for releases: takes hours."""
    global full_asked_for
    full_asked_for = True
    names = [f"{name}({version})" for name, versions in EVERYWHERE.items() for version in versions]
    for name in ("lint", "wheel", *names, "deepspeed", "matrix", "docs"):
        session.notify(name, posargs=["--screenshots"] if name == "docs" else [])


@nox.session
@timed
def check(session: nox.Session) -> None:
    """For people: quick tests on the newest version, not of torch.compile, two processes or attention alone."""
    session.install("-e", ".[test]", *pins(VERSIONS[-1]))
    quick = ["-m", "not slow and not fuzz", *(f"--ignore={path}" for path in (DISTRIBUTED, *NEWEST_ONLY))]
    session.run("pytest", "-n2", "--dist=loadgroup", *(session.posargs or quick), env=ALONE)


@nox.session
def fuzz(session: nox.Session) -> None:
    """The fuzzers at length and at random, on the newest version; `-- --examples 500 -k dialects` is less."""
    session.install("-e", ".[test]", *pins(VERSIONS[-1]))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=3000)
    asked, others = parser.parse_known_args(session.posargs)
    session.run("pytest", "-n2", "tests/fuzz", *others, env={**ALONE, "PADFREE_FUZZ_EXAMPLES": str(asked.examples)})


@nox.session
def canary(session: nox.Session) -> None:
    """Conformance, patching, the Trainer, PEFT and TRL on the newest releases of the index; not part of CI."""
    newest = ["transformers", "accelerate", "peft", "trl", "datasets"]
    session.install("--upgrade", "-e", ".[test]", TORCH, BITSANDBYTES, "scikit-learn", *newest)
    session.run("uv", "pip", "list", external=True)
    folders = ["tests/patching", "tests/seams", "tests/integrations"]
    files = [*folders, "tests/promises/test_exactness.py", "tests/promises/test_adapters.py"]
    session.run("pytest", "-n2", *(session.posargs or files), "-W", "default", env=ALONE)
    session.run("pytest", str(OWN_PROCESS / "trl_checks.py"), "-W", "default", env=ALONE)
    session.run("python", "tools/peft_methods.py", ".nox/peft-canary", env=ALONE)


@nox.session
@nox.parametrize("transformers", [nox.param(version, id=version) for version in FLASH_ATTN])
def flash_attn(session: nox.Session, transformers: str) -> None:
    """Models and backend on the real flash-attn package, without a GPU; one version of each era."""
    # Triton 3.9's autotuner rejects a name in these kernels, and its interpreter of 3.3 needs numpy 1.
    session.install("-e", ".[test]", TORCH, f"transformers=={transformers}", "numpy<2", "triton==3.3.1", "einops")
    session.install("packaging", "ninja", "wheel", "setuptools", "psutil")
    session.install("--no-build-isolation", "flash-attn==2.8.3", env=FLASH_ATTN_ON_CPU)
    environment = {**FLASH_ATTN_ON_CPU, "PADFREE_FLASH_ATTENTION": "1", **ALONE}
    arguments = session.posargs or ["-n2", "-W", "default"]  # Triton's and numpy's own warnings
    session.run("pytest", str(OWN_PROCESS / "flash_attn_checks.py"), *arguments, env=environment)


@nox.session(tags=["ci"])
@nox.parametrize("transformers", [nox.param(version, id=version) for version in TRL])
@timed
def trl(session: nox.Session, transformers: str) -> None:
    """TRL's trainers with our collators and models, on a TRL of the time of each transformers version."""
    session.install("-e", ".[test]", *pins(transformers), TRL[transformers])
    _checks(session, "trl_checks.py", "trl_preference_checks.py")


@nox.session
@nox.parametrize("transformers", [nox.param(version, id=version) for version in VERSIONS])
def peft(session: nox.Session, transformers: str) -> None:
    """Every method of PEFT on a packed row; once it has run on all versions, docs/peft.md is written."""
    session.install("-e", ".[test]", *pins(transformers), "scikit-learn")  # for AdaMSS
    session.run("python", "tools/peft_methods.py", ".nox/peft-methods", env={"HF_HUB_OFFLINE": "1"})


@nox.session
def deepspeed(session: nox.Session) -> None:
    """ZeRO on two CPU processes, on the newest transformers."""
    session.install("-e", ".[test]", *pins(VERSIONS[-1]), "setuptools", "ninja", "py-cpuinfo")
    # Operators are compiled when they are first needed, and CUDA's never are.
    session.install("--no-build-isolation", "deepspeed==0.19.8", env={"DS_BUILD_OPS": "0"})
    _checks(session, "deepspeed_checks.py")


def _checks(session: nox.Session, *files: str) -> None:
    """Tests of a library that the ordinary tests do without, its warnings being its own."""
    report = Path(session.virtualenv.location) / "junit.xml"
    paths = [str(OWN_PROCESS / file) for file in files]
    arguments = [f"--junitxml={report}", *paths, "-W", "default", *session.posargs]
    none_chosen = [5] if session.posargs else []  # by the -k of `make test`, say
    session.run("pytest", *arguments, env={**ALONE, "DS_ACCELERATOR": "cpu"}, success_codes=[0, *none_chosen])


EVERYWHERE = {"tests": VERSIONS, "trl": list(TRL), "peft": VERSIONS, "flash_attn": FLASH_ATTN}
ON_VERSIONS = [sys.executable, "tools/matrix_on_versions.py"]  # on the built wheel, two versions at a time


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """Every patch, variant and implementation on every minor, or on the versions given; writes docs/support.md."""
    session.run(*ON_VERSIONS, "--merge", *session.posargs, external=True)


@nox.session(venv_backend="none", tags=["ci"])
@timed
def eras(session: nox.Session) -> None:
    """The matrix on the first and last version of each era, compared with docs/support.json."""
    session.run(*ON_VERSIONS, "--compare", external=True)


@nox.session(venv_backend="none")
def breadth(session: nox.Session) -> None:
    """Every decoder of six transformers, or of the versions given, without a patch; adds it to docs/support.md."""
    session.run(*ON_VERSIONS, "--breadth", *session.posargs, external=True)


@nox.session(venv_backend="none")
def ways(session: nox.Session) -> None:
    """What transformers does unpatched, by way of calling, on every minor or those given; writes docs/upstream.md."""
    session.run(*ON_VERSIONS, "--ways", *session.posargs, external=True)


@nox.session(venv_backend="none")
def door(session: nox.Session) -> None:
    """TRL, LLaMA-Factory, ms-swift, axolotl, scripts: without and with the door; writes the table of docs/tools.md."""
    session.run(sys.executable, "tools/door.py", *session.posargs, external=True)


@nox.session
def upstream(session: nox.Session) -> None:
    """transformers' own model tests, with and without apply: `-- CHECKOUT [--page] [files and options of pytest]`."""
    if not session.posargs:
        session.error("which checkout of transformers? nox -s upstream -- CHECKOUT [pytest options]")
    tool, checkout = "tools/upstream_tests.py", session.posargs[0]
    session.install("-e", ".", TORCH)
    with tempfile.TemporaryDirectory() as folder:
        found = session.run("python", tool, "--needs", checkout, folder, silent=True)
        version, *needed = found.splitlines()[-1].split()
        minor = version.split(".dev")[0].rpartition(".")[0] + "."
        of_its_time = [beside for each, beside in BESIDE.items() if each.startswith(minor)]
        beside = of_its_time[0] if of_its_time else ["numpy<2" if version.startswith("4") else "numpy", "accelerate"]
        session.install("-e", ".", TORCH, *needed, *beside, "pytest-xdist", "parameterized")
    session.run("python", tool, *session.posargs, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


@nox.session(tags=["ci"])
@timed
def docs(session: nox.Session) -> None:
    """The site in build/site; a broken link is an error. `-- --screenshots`: the notebook and a browser too."""
    session.install(*DOCS["site"])
    if seen := "--screenshots" in session.posargs:
        session.install("-e", ".[pictures,demo]", *pins(VERSIONS[-1]), *DOCS["seen"])
        session.run("python", "tools/run_notebook.py", env=ALONE)
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})
    if seen:
        session.run("python", "tools/screenshots.py")


@nox.session
def demo(session: nox.Session) -> None:
    """A small fine-tuning run, padded and padding-free, under a transformers without native support."""
    session.install("-e", ".[demo]", *pins("4.41.2"))
    session.run("python", "-m", "padfree_patch.demo", *session.posargs)


@nox.session
def real_input(session: nox.Session) -> None:
    """The demo on a real model and real text; writes docs/real-input.md. Takes most of an hour on two cores."""
    session.install("-e", ".[demo]", *pins("4.41.2"))
    session.run("python", "benchmarks/real_input.py", *session.posargs)


@nox.session
def benchmark(session: nox.Session) -> None:
    """`-- step ...`: a script of benchmarks/, whose first lines say its options; `-- report` writes their page."""
    name, *arguments = session.posargs
    beside = [TRL[VERSIONS[-1]]] if name == "packing" else []  # beside which our packing is measured
    session.install("-e", ".[demo]", *pins(VERSIONS[-1]), *beside)
    # glibc would give every block over 32 MB back to the system, and page faults would be timed instead of the step.
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)} if name == "scaling" else {}
    session.run("python", f"benchmarks/{name}.py", *arguments, env=kept)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """With CUDA, offline: gpu tests and benchmarks/gpu.py in the python3 on PATH, into which this is installed."""
    python, uv = str(shutil.which("python3")), str(Path(sys.executable).with_name("uv"))
    offline = ["--no-deps", "--no-build-isolation", "--offline", "--quiet"]
    session.run(uv, "pip", "install", "--python", python, *offline, "-e", ".", external=True)
    session.run(
        python, "-m", "pytest", "tests/promises/test_gpu.py", "tests/promises/test_gpu_labelled.py", external=True
    )
    session.run(python, "benchmarks/gpu.py", *session.posargs, external=True)
