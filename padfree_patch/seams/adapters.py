"""The forward of PEFT's models, which works per row before a patched model in it sees anything.

A packed row with an adapter that can't serve it is refused there. Adapters that came after apply are checked at their
first packed call, outside everything that PEFT does for a call. No loss crosses a boundary,
also where an adapter takes the labels past the patched head.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..adapters import adapters_of, takes_labels_past_the_head
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam
from .head import ignore_boundaries
from .kinds import Found
from .model_call import batch_of_call, check_active_adapters
from .model_call import concerns as may_be_packed

NAME = "adapters"


def find(model: nn.Module, patch: Patch | None = None) -> Found:
    """Returns PEFT's forwards, if PEFT is imported: the model may be put into one of them later."""
    classes = [cls for name in ("PeftModel", "PeftMixedModel") for cls in _with_subclasses(_peft_class(name))]
    owners = [f"{cls.__module__}:{cls.__qualname__}" for cls in classes if "forward" in vars(cls)]
    return Found(frozenset(Seam(owner, "forward", concerns, answer, optional=True) for owner in owners))


def _peft_class(name: str) -> type | None:
    found: type | None = getattr(sys.modules.get("peft"), name, None)
    return found


def _with_subclasses(cls: type | None) -> list[type]:
    if cls is None or not cls.__module__.startswith("peft."):  # others' subclasses call these
        return []
    below: list[type] = cls.__subclasses__()
    return [cls, *(each for sub in below for each in _with_subclasses(sub))]


def concerns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    opt_in = OptIn.of(args[0])  # of the patched model inside: PEFT looks there for what it does not have itself
    if opt_in is None or (opt_in.has_checked(adapters_of(args[0])) and not takes_labels_past_the_head(args[0])):
        return False
    return may_be_packed(args, kwargs)


def answer(call: Call) -> Any:
    _prepare(call)
    return call.proceed()


@torch.compiler.disable
def _prepare(call: Call) -> None:
    batch = batch_of_call(call)
    if batch is not None:
        check_active_adapters(call.module)
        ignore_boundaries(call.arguments, batch)
