"""What apply would change: found and checked before anything does."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..adapters import check_adapters
from ..registry import Patch, patch_for
from ..seams import KINDS
from ..wrapping.seam import Seam


@dataclasses.dataclass(frozen=True)
class Plan:
    """The modules that opt in and the seams that they need."""

    patch: Patch
    modules: tuple[nn.Module, ...]
    seams: tuple[Seam, ...]


def plan(model: nn.Module) -> Plan:
    """Finds every place where upstream must be entered for `model`. Changes nothing.

    Raises PadfreeError if there is no patch for the model, or upstream's code is not what the patch was made for.
    """
    patch = patch_for(model)
    check_adapters(model)
    found = [kind.find(model, patch) for kind in KINDS]
    modules = {id(module): module for each in found for module in each.modules}
    seams = {seam for each in found for seam in each.seams}
    return Plan(patch, tuple(modules.values()), tuple(sorted(seams, key=str)))
