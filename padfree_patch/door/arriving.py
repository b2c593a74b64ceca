"""A model that comes through the door is patched, or left alone with a line that says why."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from ..models import is_transformers_model, pretrained_modules
from ..patching import restore
from .options import Options
from .say import say
from .verifying import patch_to_train
from .watch import watch


def arrived(model: object, options: Options) -> TypeGuard[nn.Module]:
    """Patches what a function of transformers has made, if it is a model; returns whether it did. Never raises."""
    return isinstance(model, nn.Module) and is_transformers_model(model) and patched(model, options)


def patched(model: nn.Module, options: Options) -> bool:
    """Patches a model, to be verified when its training begins; returns whether it could be, and says if not."""
    try:
        patch_to_train(model, options.backend)
    except Exception as error:  # somebody else's model, of whatever kind, must go on as without the door
        leave_alone(model, options, error)
        return False
    watch(pretrained_modules(model)[0], strict=options.strict)
    return True


def leave_alone(model: nn.Module, options: Options, reason: Exception) -> None:
    """Takes every patch off a model that can't be patched, says why, and has its training batches watched."""
    restore(model)
    outermost = pretrained_modules(model)[0]
    first, *_ = str(reason).splitlines() or [repr(reason)]
    say(f"{type(outermost).__name__} ({outermost.config.model_type}) is left unpatched: {first}")
    watch(outermost, strict=options.strict, refusal=first)
