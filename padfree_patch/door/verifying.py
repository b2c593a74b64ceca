"""A patched model is verified where its training begins, on the device and with the backend that trains; once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from .. import verification
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..patching import apply, is_applied
from ..patching.deferred import apply_deferred
from ..patching.later import verify_later
from ..seams.kernel import recording_backends
from ..verification.untouched import is_sharded
from ..wrapping.opt_in import OptIn
from .say import say

_said: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""The outermost transformers models of which a line was said, and whether there is nothing left to verify."""


def verify_once(model: nn.Module) -> None:
    """Verifies a patched model, also inside of a wrapper, and says so in one line; does nothing once that is done.

    A model that no patch is registered for is entered in the first way that is right. Weights that are not there yet
    are verified at the next call.

    Raises LeakError if its examples mix, PadfreeError if no way is right or the model can't run a packed row.
    """
    outermost = pretrained_modules(model)[0]
    if _said.get(outermost):
        return
    backends, reason = _measured(model)
    done = reason is None or is_sharded(model)
    if done:
        OptIn.note_checked(model)
    if done or outermost not in _said:
        where = f"verified on {next(outermost.parameters()).device}" if reason is None else f"not verified: {reason}"
        say(f"{type(outermost).__name__} ({outermost.config.model_type}) patched, backend {backends}, {where}")
    _said[outermost] = done


def check_packed_call(module: nn.Module) -> None:
    """Verifies a model in a packed call; `OptIn.check` of every model that came through the door.

    Raises what `verify_once` raises, or `verify_later` about adapters that came after.
    """
    if _said.get(pretrained_modules(module)[0]):
        verify_later(module)
    else:
        verify_once(module)


def patch_to_train(
    model: nn.Module, backend: str = "auto", check: Callable[[nn.Module], None] = check_packed_call
) -> None:
    """Patches a model, to be verified when its training begins; leaves one as it is that is patched already.

    `check` is what its first packed training call is checked with.

    Raises PadfreeError, with the model as it was, if it can't be patched.
    """
    if not is_applied(model):
        apply_deferred(model, backend=backend, check=check)


def _measured(model: nn.Module) -> tuple[str, str | None]:
    """Returns the backends that answered, and why nothing could be measured; None if examples do not mix."""
    who, asked = type(pretrained_modules(model)[0]).__name__, next(iter(OptIn.all_in(model).values())).backend
    try:
        if reason := _why_not(model):
            return asked, reason
        if any(each.unproven for each in OptIn.all_in(model).values()):
            apply(model, backend=asked)
        with recording_backends() as backends:
            result = verification.verify_as_it_trains(model)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(f"{who}, which padfree_patch patched, can't run a packed row: {error!r}") from error
    if not result:
        raise result.error(f"{who}, which padfree_patch patched,", outcome="its training was stopped")
    return ", ".join(sorted(backends)) or "upstream's own, per sequence", None


def _why_not(model: nn.Module) -> str | None:
    """Says why nothing can be measured on the weights that are there; None if it can."""
    if reason := verification.why_it_cannot_run(model):
        return reason
    if is_sharded(model):  # inside of FSDP, which shows nothing of itself there
        return "tensors stand in the place of its weights while it runs (as inside of FSDP)"
    return verification.why_nothing_shows(model)
