"""What a kind of seam must have, and what its `find` gives."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import nn

from .. import versions
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call, signature, takes_keyword
from ..wrapping.opt_in import OptIn, is_class_forward
from ..wrapping.seam import Seam, original_of


@dataclasses.dataclass(frozen=True)
class Found:
    """Where one kind of seam is needed in a model."""

    seams: frozenset[Seam] = frozenset()
    modules: tuple[nn.Module, ...] = ()
    """Modules that must opt in."""


class Kind(Protocol):
    """A file in `padfree_patch.seams`: one kind of place where upstream is entered."""

    NAME: str

    def find(self, model: nn.Module, patch: Patch) -> Found:
        """Returns the places that a model has, without changing anything.

        Raises PadfreeError if upstream's code is not what the patch was made for.
        """
        ...

    def answer(self, call: Call) -> object:
        """Answers a call that concerns a packed batch. The kind's seams hold it, or others of its file beside it."""
        ...


def check_class_found(patch: Patch, model: nn.Module, wanted: str, found: tuple[nn.Module, ...]) -> None:
    """Raises PadfreeError if no module of the class that the patch names was found; lists those there are."""
    if not found:
        names = sorted({type(module).__name__ for module in model.modules()})
        code = type(pretrained_modules(model)[0]).__module__
        raise changed(
            patch, f"no module of class {wanted} in {type(model).__name__} (from {code}); found {', '.join(names)}"
        )


def check_takes(patch: Patch | None, module: nn.Module, *names: str) -> None:
    """Raises PadfreeError unless the forward has the parameters, or if something on the instance hides the class's."""
    if OptIn.of(module) is not None:
        return
    function, name = original_of(type(module).forward), type(module).__name__
    for wanted in names:
        if not takes_keyword(function, wanted):
            has = ", ".join(list(signature(function).parameters)[1:])
            raise changed(patch, f"{name}.forward has no parameter {wanted}; it has {has}")
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is not None and not is_class_forward(module, own):
        raise PadfreeError(
            f"{name}.forward is replaced on the instance by {getattr(own, '__qualname__', type(own).__name__)}, "
            "so that a patch of the class would not reach it; "
            "call padfree_patch.apply before what replaces it (accelerator.prepare, torch.compile of a forward)"
        )


def check_causal(module: nn.Module) -> None:
    """Raises PadfreeError if an attention module, or its config, says that its attention is not causal."""
    for where, says in ((type(module).__name__, module), ("its config", getattr(module, "config", None))):
        if getattr(says, "is_causal", None) is False:
            raise PadfreeError(
                f"{type(module).__name__} is not causal (is_causal of {where} is False); packed attention always is: "
                "set it to True, or train this model on padded batches without padfree_patch"
            )


def class_named(module: nn.Module, name: str) -> type:
    """Returns the class of that name among the bases of a module's class."""
    return next(base for base in type(module).__mro__ if base.__name__ == name)


def changed(patch: Patch | None, what: str) -> PadfreeError:
    """Returns the error for upstream's code that is not what the patch was made for."""
    here = f"{what} in transformers {versions.transformers_version()}"
    if patch is None:
        return PadfreeError(here)
    return PadfreeError(f"{patch.model_type}: {here} (patch tested on {patch.transformers})")
