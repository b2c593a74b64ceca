"""What apply would change: found and checked before anything does."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..errors import PadfreeError
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
    check_no_virtual_tokens(model)
    found = [kind.find(model, patch) for kind in KINDS]
    modules = {id(module): module for each in found for module in each.modules}
    seams = {seam for each in found for seam in each.seams}
    return Plan(patch, tuple(modules.values()), tuple(sorted(seams, key=str)))


def check_no_virtual_tokens(model: nn.Module) -> None:
    """Raises PadfreeError for PEFT's prompt tuning and its kind."""
    for module in model.modules():
        config = getattr(module, "active_peft_config", None)  # of a PeftModel
        if getattr(config, "is_prompt_learning", False):
            raise PadfreeError(
                f"{type(module).__name__} with {type(config).__name__} puts virtual tokens before each row, where only "
                "the first example of a packed row could see them; train it on padded batches"
            )
