"""What the door was asked for, and how it reaches other processes. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import PadfreeError

VARIABLE = "PADFREE_PATCH_RUN"
"""Private: `padfree-patch run` writes it, and the Pythons that it starts read it."""

STARTUP = Path(__file__).with_name("startup")
"""The folder whose sitecustomize.py every Python below `padfree-patch run` executes first."""

BACKENDS = ("auto", "flash_attn_3", "flash_attn", "torch_varlen", "flex", "sdpa")
"""What `padfree_patch.attention.names()` lists, which can't be asked without importing torch."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do with the models of a process."""

    backend: str = "auto"
    strict: bool = True
    """Whether a packed training row of a model that could not be patched is an error."""

    def __str__(self) -> str:
        return f"backend={self.backend},strict={int(self.strict)}"

    @staticmethod
    def read(text: str) -> Options:
        """Reads what `str` wrote; what is missing is the default.

        Raises PadfreeError if something else was written there.
        """
        given = dict(part.partition("=")[::2] for part in text.split(",") if part)
        if given.keys() - {"backend", "strict"} or given.get("strict", "1") not in ("0", "1"):
            raise PadfreeError(f"{VARIABLE} is {text!r}, which padfree-patch run does not write; unset it")
        return Options(check_backend(given.get("backend", "auto")), given.get("strict", "1") == "1")


def check_backend(name: str) -> str:
    """Returns the name; raises PadfreeError, in one line, if no backend has it."""
    if name not in BACKENDS:
        raise PadfreeError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def variables(options: Options, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the two environment variables by which a Python and all its children go through the door."""
    before = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each != str(STARTUP)]
    path = os.pathsep.join([str(STARTUP), *before]) if any(before) else str(STARTUP)
    return {"PYTHONPATH": path, VARIABLE: str(options)}
