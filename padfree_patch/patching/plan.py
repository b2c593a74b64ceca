"""What apply would change: found and checked before anything does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from ..any_decoder import builders, interface, mixers, models, whole_row
from ..any_decoder.way import Way
from ..registry import Patch, model_type_of
from ..seams import KINDS, adapters, generation, rotary
from ..seams.answers import patched_layers
from ..seams.kinds import Found
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, lock


@dataclasses.dataclass(frozen=True)
class Plan:
    """The modules that opt in and the seams that they need."""

    model_type: str
    modules: tuple[nn.Module, ...]
    seams: tuple[Seam, ...]


def plan(model: nn.Module, patch: Patch) -> Plan:
    """Finds every place where upstream must be entered for `model`. Changes nothing.

    Raises PadfreeError if upstream's code is not what the patch was made for.
    """
    return _joined(model, [kind.find(model, patch) for kind in KINDS])


def plan_way(model: nn.Module, way: Way) -> Plan:
    """Finds the places of a way to patch a model that no patch is registered for. Changes nothing."""
    kinds = (models, builders, interface, mixers, whole_row)
    everywhere = (generation.find(model), rotary.find(model), adapters.find(model))
    return _joined(model, [*(kind.find(model, way) for kind in kinds), *everywhere])


def _joined(model: nn.Module, found: Iterable[Found]) -> Plan:
    found = list(found)
    modules = {id(module): module for each in found for module in each.modules}
    seams = {seam for each in found for seam in each.seams}
    return Plan(model_type_of(model), tuple(modules.values()), tuple(sorted(seams, key=str)))


def opt_in(planned: Plan, already: dict[nn.Module, OptIn], backend: str) -> None:
    """Installs the seams of a plan, and marks its modules; those that were patched before get what is new."""
    new = [module for module in planned.modules if module not in already]
    with lock:  # or another thread's restore could find the seams unused in between
        # Before the seams: garbage that is collected in between takes out those that nobody needs.
        opt_ins = [OptIn(planned.model_type, backend, planned.seams) for _ in new]
        for seam in planned.seams:
            seam.install()
        for module, opt_in in zip(new, opt_ins):
            opt_in.attach(module)
        for opt_in in already.values():
            opt_in.backend, opt_in.seams = backend, planned.seams


def count_layers(planned: Plan, patch: Patch) -> None:
    """Notes how many layers of each decoder are patched, which later packed calls must answer."""
    for decoder in planned.modules:
        if (mine := OptIn.of(decoder)) and patch.is_decoder(decoder):
            mine.layers = len(patched_layers(decoder, patch))


def enter_patch(model: nn.Module, patch: Patch, already: dict[nn.Module, OptIn], backend: str) -> None:
    """Plans and patches a model with a registered patch; raises PadfreeError, with nothing changed, if that fails."""
    planned = plan(model, patch)
    opt_in(planned, already, backend)
    count_layers(planned, patch)
