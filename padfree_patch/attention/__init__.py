"""Varlen attention backends, and which of them can do what a call needs.

A backend is a module here that has what `Backend` asks for. Adding one is a file and its name in `BACKENDS`.
"""

from __future__ import annotations

import functools

import torch

from ..errors import PadfreeError
from . import flash_attn, flash_attn_3, flex, sdpa, torch_varlen
from .spec import Backend, Needs

__all__ = ["BACKENDS", "Backend", "Needs", "check_name", "find", "names", "refusal", "select"]

BACKENDS: tuple[Backend, ...] = (flash_attn_3, flash_attn, torch_varlen, flex, sdpa)
"""In the order of preference: the fastest first."""


def names() -> list[str]:
    """Lists the names that `backend=` takes."""
    return ["auto", *(backend.NAME for backend in BACKENDS)]


def check_name(name: str) -> None:
    """Raises PadfreeError, with every backend and the reason against it, if no backend has that name."""
    if name in names():
        return
    here = Needs(device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.get_default_dtype(), head_dim=64)
    raise PadfreeError(f"unknown backend {name!r}; choose auto or one of these ({here}):\n{_list_reasons(here)}")


def find(needs: Needs, name: str = "auto") -> Backend | None:
    """Finds the first backend that can do what a call needs, or the named one; None if it can't."""
    able = (backend for backend in BACKENDS if name in ("auto", backend.NAME) and refusal(backend, needs) is None)
    return next(able, None)


@functools.lru_cache(maxsize=64)
def select(needs: Needs, name: str = "auto") -> Backend:
    """Finds the first backend that can do what a call needs, or the named one.

    Raises PadfreeError with every candidate and the reason against it.
    """
    check_name(name)
    if (backend := find(needs, name)) is not None:
        return backend
    wanted = "no attention backend for" if name == "auto" else f"backend {name!r} can't serve"
    raise PadfreeError(f"{wanted} {needs}:\n{_list_reasons(needs)}")


def _list_reasons(needs: Needs) -> str:
    return "\n".join(f"  {backend.NAME}: {refusal(backend, needs) or 'works'}" for backend in BACKENDS)


def refusal(backend: Backend, needs: Needs) -> str | None:
    """Says why a backend can't do what a call needs; None if it can."""
    if needs.prompts and not backend.KNOWS_PROMPTS:
        return "knows no prompts that sequences share"
    if needs.sinks and not backend.KNOWS_SINKS:
        return "knows no sinks"
    return backend.refusal(needs)
