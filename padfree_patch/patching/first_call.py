"""What apply could not check, because the weights were not there yet: at the first packed training call."""

from __future__ import annotations

import torch
from torch import nn

from .. import verification
from ..wrapping.opt_in import OptIn


def verify_at_first_call(module: nn.Module) -> None:
    """Raises PadfreeError unless a patched model that apply could not check isolates its examples now.

    Not in a run of several processes: only some of them may have been without weights, and a check that only these make
    would wait for the others for ever. There every packed call still has to be answered by every layer.
    """
    for each in module.modules():
        if opt_in := OptIn.of(each):
            opt_in.first_check = None
    if _several_processes():
        return
    result = verification.verify(module)
    if not result and not result.skipped:
        raise result.error(f"{type(module).__name__}, which apply could not check,")


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
