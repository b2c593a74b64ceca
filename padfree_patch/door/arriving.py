"""A model that comes through the door is patched, or left alone with a line that says why."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from ..errors import LeakError, PadfreeError
from ..models import is_transformers_model, pretrained_modules
from ..patching import restore, way_of
from .options import Options
from .say import say
from .verifying import check_packed_call, patch_to_train
from .watch import watch


def arrived(model: object, options: Options) -> TypeGuard[nn.Module]:
    """Patches what a function of transformers has made, if it is a model; returns whether it did. Never raises."""
    return isinstance(model, nn.Module) and is_transformers_model(model) and patched(model, options)


def patched(model: nn.Module, options: Options) -> bool:
    """Patches a model, to be verified when its training begins; returns whether it could be, and says if not."""
    try:
        patch_to_train(model, options.backend, check_packed_call if options.strict else check_or_leave_alone)
    except Exception as error:  # somebody else's model, of whatever kind, must go on as without the door
        leave_alone(model, options, error)
        return False
    watch(pretrained_modules(model)[0], strict=options.strict)
    return True


def check_or_leave_alone(module: nn.Module) -> None:
    """Verifies a model in a packed call, or leaves it alone if no way is right: where packed rows of it are allowed.

    Raises what `check_packed_call` raises about any other model.
    """
    try:
        check_packed_call(module)
    except PadfreeError as error:
        leave_alone_if_refused(module, Options(strict=False), error)


def leave_alone_if_refused(model: nn.Module, options: Options, error: PadfreeError) -> None:
    """Leaves a model alone for which no way was found that is right; raises the error if it says anything else."""
    if isinstance(error, LeakError) or not way_of(model):
        raise error
    leave_alone(model, options, error)


def leave_alone(model: nn.Module, options: Options, reason: Exception) -> None:
    """Takes every patch off a model that can't be patched, says why, and has its training batches watched."""
    restore(model)
    outermost = pretrained_modules(model)[0]
    first, *_ = str(reason).splitlines() or [repr(reason)]
    say(f"{type(outermost).__name__} ({outermost.config.model_type}) is left unpatched: {first}")
    watch(outermost, strict=options.strict, refusal=first)
