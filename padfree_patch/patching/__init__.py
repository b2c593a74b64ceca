"""apply and restore: plan, check, wrap, opt in, verify, and on any failure put everything back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from .. import attention, verification, versions
from ..batch.packed_batch import known_batches
from ..errors import PadfreeError
from ..registry import Patch
from ..seams.decoder import IMPLEMENTATIONS
from ..seams.window import measured
from ..wrapping.opt_in import OptIn, living, remove_unused_seams
from ..wrapping.seam import lock
from .plan import Plan, check_no_virtual_tokens, plan

__all__ = ["IMPLEMENTATIONS", "applied", "apply", "check_no_virtual_tokens", "is_applied", "places", "restore"]

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, *, backend: str = "auto", verify: bool = True) -> Model:
    """Makes `model` train each example of a packed batch as if it stood alone. Changes nothing else about it.

    Args:
        model: a transformers model, also inside PEFT, DDP, FSDP or a compiled module.
        backend: "auto" takes the fastest that can do what a call needs; see `padfree_patch.attention.BACKENDS`.
        verify: check on the model itself that examples do not mix (`padfree_patch.verify`).

    Returns the same object. Applying twice is applying once, with the newer backend.

    Raises PadfreeError, with the model as it was, if there is no patch for it, upstream's code is not what the patch
    was made for, or the check finds that examples still mix (`LeakError`).
    """
    attention.check_name(backend)
    planned = plan(model)
    _warn_if_untested(planned.patch)
    before = _backends(model)
    new = [module for module in planned.modules if OptIn.of(module) is None]
    try:
        _opt_in(planned, new, backend)
        for opt_in in before:
            opt_in.backend = backend
        if verify:
            _verify(planned.patch, model)
    except BaseException:
        _opt_out(new)
        for opt_in, old in before.items():
            opt_in.backend = old
        raise
    return model


def restore(model: Model) -> Model:
    """Takes `apply` back; a model that is not patched is left as it is. Returns the same object."""
    for module in model.modules():
        OptIn.detach(module)
    _remove_unused()
    return model


@contextmanager
def applied(model: Model, *, backend: str = "auto", verify: bool = True) -> Iterator[Model]:
    """`apply`, and `restore` at the end, also after an error. A model that was patched before stays as it was then."""
    before = _backends(model)
    apply(model, backend=backend, verify=verify)
    try:
        yield model
    finally:
        if not before:
            restore(model)
        for opt_in, old in before.items():
            opt_in.backend = old


def is_applied(model: nn.Module) -> bool:
    """Whether any module of the model is patched."""
    return any(OptIn.of(module) for module in model.modules())


def places(model: nn.Module) -> tuple[str, ...]:
    """Returns the functions that are wrapped for a patched model, as dotted names."""
    seams = {seam for module in model.modules() if (opt_in := OptIn.of(module)) for seam in opt_in.seams}
    return tuple(sorted(str(seam) for seam in seams))


def _backends(model: nn.Module) -> dict[OptIn, str]:
    """Returns the backend of every module that is patched already."""
    return {opt_in: opt_in.backend for module in model.modules() if (opt_in := OptIn.of(module))}


def _opt_in(planned: Plan, new: list[nn.Module], backend: str) -> None:
    with lock:  # or another thread's restore could find the seams unused in between
        for seam in planned.seams:
            seam.install()
        for module in new:
            OptIn(planned.patch.model_type, backend, planned.seams).attach(module)


def _opt_out(modules: list[nn.Module]) -> None:
    for module in modules:
        if opt_in := OptIn.of(module):
            living.discard(opt_in)  # the error's own frames still hold it, which would keep the seams
        OptIn.detach(module)
    _remove_unused()


def _remove_unused() -> None:
    """Puts back what no model needs any more, and with the last model forgets what was read and measured."""
    remove_unused_seams()
    if not living:
        known_batches.clear()
        measured.clear()


def _warn_if_untested(patch: Patch) -> None:
    version = versions.transformers_version()
    if not versions.inside(version, patch.transformers):
        warnings.warn(
            f"padfree_patch: {patch.model_type} was tested on transformers {patch.transformers}, this is {version}. "
            "Leave verify=True, which checks the model itself, and tell us whether it passed",
            stacklevel=3,
        )


def _verify(patch: Patch, model: nn.Module) -> None:
    try:
        result = verification.verify(model)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(
            f"{patch.model_type}: the patched model can't run a packed row: {error!r} on transformers "
            f"{versions.transformers_version()} (patch tested on {patch.transformers}); it was put back as it was"
        ) from error
    if result.skipped:
        warnings.warn(
            f"padfree_patch.apply could not check its work: {result.skipped}. "
            "Call padfree_patch.verify(model) once the weights are there, or pass verify=False",
            stacklevel=3,
        )
    elif not result:
        raise result.error("the patched model", outcome="it was put back as it was")
