"""Says in the environment where uv finds packages: as pip is told, and torch where this machine can reach it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

from pins import TORCH

NAME = "UV_TORCH_BACKEND"


def prepare() -> None:
    """Prepares this process's environment, for every uv that it starts."""
    if places := os.environ.get("PIP_FIND_LINKS"):  # uv does not read it; pip separates by spaces, uv by commas
        os.environ.setdefault("UV_FIND_LINKS", ",".join(places.split()))
    drop_if_unreachable(Path(sys.executable).with_name("uv"), os.environ)


def drop_if_unreachable(uv: Path, environment: MutableMapping[str, str]) -> None:
    """Takes UV_TORCH_BACKEND away, and says so, if uv finds no torch with it; the package index has one too.

    UV_TORCH_BACKEND=cpu means the small build of PyTorch's own index.
    """
    backend = environment.get(NAME)
    if not backend:
        return
    trial = [str(uv), "pip", "install", "--dry-run", "--no-deps", "--reinstall-package=torch", "--python"]
    done = subprocess.run([*trial, sys.executable, TORCH], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        del environment[NAME]
        reason = (done.stderr.strip().splitlines() or ["uv says no more"])[-1].strip()
        print(f"{NAME}={backend}: no torch there ({reason}); it comes from the package index instead", file=sys.stderr)
