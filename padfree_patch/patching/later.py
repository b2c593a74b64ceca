"""What apply could not check: adapters that came after it, and weights that were not there yet."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .. import verification
from ..adapters import adapters_of, check_adapters
from ..errors import PadfreeError
from ..wrapping.opt_in import OptIn


def verify_later(module: nn.Module) -> None:
    """Raises PadfreeError unless a patched model, or PEFT's model around it, isolates its examples as it is now.

    Warns if that can't be measured. Weights that came later are checked in no run of several processes: only some of
    them may have been without, and a check that only these make would wait for the others for ever. There every packed
    call still has to be answered by every layer.
    """
    pending = any(each.pending for each in OptIn.all_in(module).values())
    if pending and _several_processes():
        return
    who = f"{type(module).__name__}{', which apply could not check,' if pending else _with_later_adapters(module)}"
    check_adapters(module)
    try:
        result = verification.verify(module)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(f"{who} can't run a packed row: {error!r}; {_TODO}") from error
    if result.skipped:
        warnings.warn(f"padfree_patch could not check {who[:-1]}: {result.skipped}", stacklevel=2)
    elif not result:
        raise result.error(who, outcome=_TODO)


_TODO = "call padfree_patch.apply on the model as it is now, which patches what has come since, or refuses it"


def _with_later_adapters(module: nn.Module) -> str:
    configs = sorted({type(config).__name__ for _, config in adapters_of(module)})
    return f" with {', '.join(configs)}, which came after padfree_patch.apply,"


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
