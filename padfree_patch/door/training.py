"""A training begins: its model has come through the door or comes through it now, and is verified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import PadfreeError
from ..models import pretrained_modules
from ..patching import is_applied
from .arriving import leave_alone_if_refused, patched
from .verifying import verify_once
from .watch import is_watched

if TYPE_CHECKING:
    from .hooks import Autopatch


def training_begins(model: object, handle: Autopatch) -> None:
    """Verifies the model that a Trainer is about to train; patches it first if it was made past the door.

    Raises LeakError if its examples mix, PadfreeError if it can't run a packed row.
    """
    if not isinstance(model, nn.Module) or not pretrained_modules(model):
        return
    if not is_applied(model):
        if is_watched(pretrained_modules(model)[0]) or not patched(model, handle.options):
            return
        handle.note(pretrained_modules(model)[0])
    try:
        verify_once(model)
    except PadfreeError as error:
        leave_alone_if_refused(model, handle.options, error)
