"""Varlen attention backends, and which of them can do what a call needs.

A backend is a module with a `NAME`, `refusal(needs)` (the reason why it can't, or None) and `attend`, whose signature
is that of `padfree_patch.attention.sdpa.attend`. Adding one is a file here and its name in `BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import torch

from ..errors import PadfreeError
from . import flash_attn, flash_attn_3, flex, sdpa, torch_varlen

BACKENDS: tuple[ModuleType, ...] = (flash_attn_3, flash_attn, torch_varlen, flex, sdpa)
"""In the order of preference: the fastest first."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one attention call asks of a backend."""

    device: str
    """Device type: "cpu", "cuda", ..."""
    dtype: torch.dtype
    head_dim: int
    window: int = 0
    """Newest tokens that a query sees, itself included; 0 for all."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap); 0 for none."""
    dropout: float = 0.0
    """Probability with which an attention weight is dropped."""

    def __str__(self) -> str:
        asked = [f"dtype={str(self.dtype).removeprefix('torch.')}", f"device={self.device}"]
        asked += [f"head_dim={self.head_dim}"]
        asked += [f"{name}={getattr(self, name)}" for name in ("window", "softcap", "dropout") if getattr(self, name)]
        return ", ".join(asked)


def names() -> list[str]:
    """The names that `backend=` takes."""
    return ["auto", *(backend.NAME for backend in BACKENDS)]


def check_name(name: str) -> None:
    """Raises PadfreeError if there is no backend of that name; lists those there are, with what speaks against each."""
    if name in names():
        return
    here = Needs(device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.get_default_dtype(), head_dim=64)
    raise PadfreeError(f"unknown backend {name!r}; choose auto or one of these ({here}):\n{_listed(here)}")


@functools.lru_cache(maxsize=64)
def select(needs: Needs, name: str = "auto") -> ModuleType:
    """The first backend that can do `needs`, or the named one.

    Raises PadfreeError with every candidate and the reason against it.
    """
    check_name(name)
    for backend in BACKENDS:
        if name in ("auto", backend.NAME) and backend.refusal(needs) is None:
            return backend
    wanted = "no attention backend for" if name == "auto" else f"backend {name!r} can't serve"
    raise PadfreeError(f"{wanted} {needs}:\n{_listed(needs)}")


def _listed(needs: Needs) -> str:
    return "\n".join(f"  {backend.NAME}: {backend.refusal(needs) or 'works'}" for backend in BACKENDS)
