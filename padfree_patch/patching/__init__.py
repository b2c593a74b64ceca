"""apply and restore: plan, check, wrap, opt in, verify, and on any failure put everything back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from .. import attention, verification, versions
from ..adapters import check_adapters
from ..errors import PadfreeError
from ..models import check_is_module, is_transformers_model
from ..registry import Patch, patch_for
from ..seams.decoder import IMPLEMENTATIONS
from ..seams.labelled import check_logits
from ..verification.entry import why_not_called_with_tokens
from ..verification.untouched import unwrapped
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import installed
from .checking import Check, check, say_applied
from .found import apply_found
from .later import verify_later
from .logits import compute_logits
from .plan import enter_patch
from .state import State, remove_unused

__all__ = ["IMPLEMENTATIONS", "applied", "apply", "is_applied", "places", "restore", "way_of"]

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, *, backend: str = "auto", verify: bool = True, logits: str = "all") -> Model:
    """Makes `model` train each example of a packed batch as if it stood alone. Changes nothing else about it.

    Args:
        model: a transformers model, also inside PEFT, DDP, FSDP or a compiled module.
        backend: "auto" takes the fastest that can do what a call needs; see `padfree_patch.attention.BACKENDS`.
        verify: check on the model itself that examples do not mix (`padfree_patch.verify`). A model that no patch is
            registered for is entered in the first way that passes this check.
        logits: which logits a training forward with labels computes, packed or padded. "all" is upstream's (B, T, V).
            "labelled" computes those of the N tokens that predict a label, and of a row of zeros: the output's `logits`
            are (1, N + 1, V). "chunked" computes them 1,024 rows at a time, and again in the backward; the output has
            no `logits`. Loss and gradients are the same. In eval mode, without gradients or labels, and where the loss
            is not upstream's, all are computed.

    Returns the same object. Applying twice is applying once, with the newer backend and logits.

    Raises PadfreeError, with the model as it was, if no way is right for it, upstream's code is not what its patch was
    made for, the check finds that examples still mix (`LeakError`), or loss or gradients with these logits are others.
    """
    say_applied(model, _apply(model, backend, logits, verify=verify))
    return model


def _apply(model: nn.Module, backend: str, logits: str, *, verify: bool) -> Check | None:
    """Does what `apply` does, and says nothing; returns the check, or None if there was none."""
    attention.check_name(backend)
    check_logits(logits)
    model = _what_can_be_checked(model) if verify and isinstance(model, nn.Module) else model
    patch = patch_for(model)
    check_adapters(model)
    before = State(model)
    try:
        if patch is None or patch.any_decoder:
            outcome: Check | str | None = apply_found(model, before, backend, verify=verify)
        else:
            outcome = _apply_patch(model, patch, before, backend, verify=verify)
        checked = outcome if isinstance(outcome, Check) else None
        if isinstance(outcome, str):
            _warn_unchecked(outcome)
        if patch is not None:
            _report_if_untested(patch, verified=checked is not None)
        compute_logits(model, logits, check=checked is not None)
        _remember(model, verify=verify, verified=checked is not None)
    except BaseException:
        before.put_back()
        raise
    return checked


def _what_can_be_checked(model: nn.Module) -> nn.Module:
    """Returns the model; or the transformers model inside, with a warning, if only its author can call the wrapper."""
    outer = unwrapped(model)
    name, found = next(
        ((name, each) for name, each in outer.named_modules() if is_transformers_model(each)), ("", model)
    )
    reason = why_not_called_with_tokens(outer)
    if reason is None or not name:
        return model
    warnings.warn(
        f"padfree_patch: {type(outer).__name__}.forward {reason}, so only the {type(found).__name__} inside it, "
        f".{name}, was checked. See that it hands on to it where examples end, and mixes none itself; apply called on "
        "the model inside does the same without this warning",
        stacklevel=4,
    )
    return found


def restore(model: Model) -> Model:
    """Takes `apply` back; a model that is not patched is left as it is. Returns the same object."""
    check_is_module(model)
    for module in model.modules():
        OptIn.detach(module)
    remove_unused()
    return model


@contextmanager
def applied(model: Model, *, backend: str = "auto", verify: bool = True, logits: str = "all") -> Iterator[Model]:
    """Applies, and restores at the end, also after an error. A model that was patched before stays as it was then."""
    check_is_module(model)
    before = State(model)
    _apply(model, backend, logits, verify=verify)
    try:
        yield model
    finally:
        before.put_back()


def is_applied(model: nn.Module) -> bool:
    """Whether any module of the model is patched."""
    return bool(OptIn.all_in(model))


def way_of(model: nn.Module) -> str:
    """Says how the examples of a patched model are kept apart in a way that was found; empty if its patch says all."""
    return next((opt_in.way for opt_in in OptIn.all_in(model).values()), "")


def places(model: nn.Module) -> tuple[str, ...]:
    """Returns the functions that are wrapped for a patched model, as dotted names."""
    seams = {seam for opt_in in OptIn.all_in(model).values() for seam in opt_in.seams}
    return tuple(sorted(str(seam) for seam in seams if seam in installed))


def _apply_patch(model: nn.Module, patch: Patch, before: State, backend: str, *, verify: bool) -> Check | str | None:
    """Patches a model with a registered patch; returns the check, why there is none, or None if none was wanted."""
    enter_patch(model, patch, before.opt_ins, backend)
    return _verify(patch, model) if verify else None


def _remember(model: nn.Module, *, verify: bool, verified: bool) -> None:
    """Notes what was checked: the model with the adapters that it has now, or nothing, which is then checked later."""
    for mine in OptIn.all_in(model).values():
        mine.check = verify_later if verify else None
        mine.pending = verify and not verified
    if verified:
        OptIn.note_checked(model)


def _report_if_untested(patch: Patch, *, verified: bool) -> None:
    """Notes in the log that this transformers is outside the tested range, or warns if the model was not checked."""
    version = versions.transformers_version()
    if versions.inside(version, patch.transformers):
        return
    untested = f"{patch.model_type} was tested on transformers {patch.transformers}, this is {version}"
    if verified:
        logging.getLogger("padfree_patch").info("%s; the check of the model itself passed", untested)
    else:
        warnings.warn(
            f"padfree_patch: {untested}. Leave verify=True, which checks the model itself",
            stacklevel=4,
        )


def _verify(patch: Patch, model: nn.Module) -> Check | str:
    """Returns the check of a patched model, or why nothing can be checked.

    Raises PadfreeError if the model can't run or gives no finite logits, LeakError if examples mix.
    """
    try:
        checked = check(model)
    except PadfreeError:
        raise
    except Exception as error:
        _raise_if_upstream_fails(model)
        raise PadfreeError(
            f"{patch.model_type}: the patched model can't run a packed row: {error!r} on transformers "
            f"{versions.transformers_version()} (patch tested on {patch.transformers}); it was put back as it was"
        ) from error
    result = checked.result
    if reason := result.skipped or (None if result.finite else verification.why_nothing_shows(model)):
        return reason
    if not result:
        raise result.error("the patched model", outcome="it was put back as it was")
    return checked


def _warn_unchecked(reason: str) -> None:
    warnings.warn(
        f"padfree_patch.apply could not check its work: {reason}. "
        "Call padfree_patch.verify(model) once the weights are there, or pass verify=False",
        stacklevel=4,
    )


def _raise_if_upstream_fails(model: nn.Module) -> None:
    """Raises PadfreeError if the model can't run one example alone either, as it is without its patches."""
    patched = OptIn.all_in(model)
    for module in patched:
        OptIn.detach(module)
    try:
        verification.run_alone(model)
    except Exception as error:
        raise PadfreeError(
            f"{type(model).__name__} fails without padfree_patch too, on an ordinary call with one example (the error "
            f"comes from transformers {versions.transformers_version()} or the model's own layers): {error!r}. So "
            "it could not be checked, and it was put back as it was. Make such a call work first, or pass "
            "verify=False if the model can run only later"
        ) from error
    finally:
        for module, opt_in in patched.items():
            opt_in.attach(module)
