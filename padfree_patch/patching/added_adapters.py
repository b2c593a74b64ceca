"""What apply could not check: adapters that came after it, at their first packed call."""

from __future__ import annotations

import warnings

from torch import nn

from .. import verification
from ..adapters import adapters_of
from ..errors import PadfreeError


def verify_added_adapters(module: nn.Module) -> None:
    """Raises PadfreeError unless a patched model, or PEFT's model around it, isolates its examples with its adapters.

    Warns if that can't be measured.
    """
    configs = ", ".join(sorted({config for _, config in adapters_of(module)}))
    who = f"{type(module).__name__} with {configs}, which came after padfree_patch.apply,"
    todo = "call padfree_patch.apply on the model with its adapters, which patches what they brought too, or refuses it"

    try:
        result = verification.verify(module)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(f"{who} can't run a packed row: {error!r}; {todo}") from error
    if result.skipped:
        warnings.warn(f"padfree_patch could not check {who[:-1]}: {result.skipped}", stacklevel=2)
    elif not result:
        raise result.error(who, outcome=todo)
