"""How a module says that it is patched: one object in its `__dict__`.

The object is copied by deepcopy, pickled with the module and shared with DataParallel's replicas, so that all of them
stay patched. As long as one that needs a seam lives anywhere, the seam stays.
"""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable

from packaging.version import Version
from torch import nn

from .. import versions
from ..adapters import Adapters, adapters_of, are_same
from ..errors import PadfreeError
from .frames import graph_is_made
from .seam import ORIGINAL, Seam, installed, lock, waiting

ATTRIBUTE = "_padfree_patch"
"""Name under which a module holds its OptIn."""


class OptIn:
    """Marks a module as patched."""

    def __init__(self, model_type: str, backend: str, seams: tuple[Seam, ...], layers: int = 0):
        self.model_type, self.backend, self.seams = model_type, backend, seams
        self.layers = layers
        """Of a decoder: layers whose attention was patched when it was."""
        self.way = ""
        """How the examples are kept apart, if no patch is registered for the model: in words, for people."""
        self.trying = False
        """Whether `apply` tries the way, so that it is no error yet if nobody answers."""
        self.answered = 0
        """Modules that answered in the last packed call; of a way that was found, what later calls must reach."""
        self.special = False
        """Of an attention module: whether upstream's own function ran on each sequence in the last packed call."""
        self.takes_sinks: bool | None = None
        """Of an attention module: whether its function computes softmax attention with sinks; None until one looks."""
        self.told_on = ""
        """Of a mixer: the type of the device on which its kernels, told where sequences begin, keep examples apart."""
        self.not_recomputed: tuple[str, ...] = ()
        """Classes inside of layers that gradient checkpointing must not run again: their batch would be gone."""
        self.reads_first_label = False
        """Of a model around a decoder: whether its loss takes labels as they are, not as what follows each token."""
        self.logits = "all"
        """Which logits a training forward with labels computes: "all", those of "labelled" tokens, or "chunked"."""
        self.set_aside: dict[str, object] = {}
        """What stood in the module's `__dict__` and would have gone past the patched class."""
        self.check: Callable[[nn.Module], None] | None = None
        """Checks at a packed call what `apply` could not: adapters that came later, weights that were not there yet.
        None if `apply` was to check nothing."""
        self.pending = False
        """Whether the model could not be checked yet as it was when it was patched."""
        self.unproven = False
        """Whether nothing has shown yet that the way in which the model was patched is right."""
        self.checked: tuple[Adapters, ...] = ()
        """The active adapters, each time that they were checked. Never changed in place: `State` keeps what it was."""
        self.being_checked = False
        """Whether a check runs, whose own calls need no other."""
        weakref.finalize(self, _one_is_gone).atexit = False  # before `living` holds it: then it is called after
        living.add(self)

    def must_check(self, adapters: Adapters) -> bool:
        """Whether a packed call with these adapters is to be checked first."""
        return bool(adapters) and not any(are_same(adapters, each) for each in self.checked)

    @staticmethod
    def of(module: object) -> OptIn | None:
        """Returns the OptIn of a module, or None if it is not patched. Of PEFT's models, that of the model inside."""
        # Not vars(module).get: that is no guard of torch.compile, which would run another model's graph for this one.
        found: OptIn | None = getattr(module, ATTRIBUTE, None)
        return found

    @staticmethod
    def all_in(model: nn.Module) -> dict[nn.Module, OptIn]:
        """Returns what every patched module of a model has opted in with; wrappers around one are none themselves."""
        found = ((module, vars(module).get(ATTRIBUTE)) for module in model.modules())
        return {module: opt_in for module, opt_in in found if opt_in is not None}

    @staticmethod
    def note_checked(model: nn.Module) -> None:
        """Notes that a model was checked as it is now, with the adapters that each of its modules has."""
        there = [adapters_of(module) for module in model.modules()]
        for opt_in in OptIn.all_in(model).values():
            opt_in.pending = opt_in.unproven = False
            for adapters in there:
                if opt_in.must_check(adapters):
                    opt_in.checked = (*opt_in.checked, adapters)

    def attach(self, module: nn.Module) -> None:
        own = vars(module)
        for name in ("forward", "_old_forward"):  # the second is where accelerate's hooks keep what they call
            if is_class_forward(module, own.get(name)):
                self.set_aside[name] = own.pop(name)
                if name == "_old_forward":
                    own[name] = types.MethodType(type(module).forward, module)
        own[ATTRIBUTE] = self
        for name in list(own):  # ours first: unpickled in another version, it says so before a class is missed
            if name != ATTRIBUTE:
                own[name] = own.pop(name)

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Takes the OptIn of a module away, if it has one."""
        opt_in = vars(module).pop(ATTRIBUTE, None)
        if opt_in is not None:
            vars(module).update(opt_in.set_aside)

    def __deepcopy__(self, memo: dict[int, object]) -> OptIn:
        twin = OptIn(self.model_type, self.backend, self.seams, self.layers)
        twin.check, twin.pending, twin.checked = self.check, self.pending, copy.deepcopy(self.checked, memo)
        twin.way, twin.not_recomputed, twin.unproven = self.way, self.not_recomputed, self.unproven
        twin.reads_first_label, twin.logits, twin.told_on = self.reads_first_label, self.logits, self.told_on
        return twin

    def __reduce__(self) -> tuple[object, ...]:
        seams = tuple(seam.by_name() for seam in self.seams)
        saved_with = str(versions.transformers_version())
        kept = ("check", "pending", "unproven", "way", "not_recomputed", "reads_first_label", "logits", "told_on")
        state = {name: getattr(self, name) for name in kept}
        return _unpickle, (self.model_type, self.backend, seams, self.layers, saved_with), state


living: weakref.WeakSet[OptIn] = weakref.WeakSet()
"""Every OptIn that a module holds, or that an error's frames still hold."""


def _unpickle(
    model_type: str, backend: str, seams: tuple[Seam, ...], layers: int = 0, saved_with: str | None = None
) -> OptIn:
    """Patches what a saved module needs, in another process too.

    Raises PadfreeError in another minor version of transformers, or if a class is not where it was.
    """
    here = versions.transformers_version()
    if saved_with is not None and Version(saved_with).release[:2] != here.release[:2]:
        raise _not_loaded(model_type, saved_with, f"this is transformers {here}, whose classes are others")
    try:
        found = tuple(seam.with_its_class() for seam in seams)
    except (AttributeError, ImportError) as error:
        raise _not_loaded(model_type, saved_with, f"here, with transformers {here}: {error}") from error
    with lock:
        opt_in = OptIn(model_type, backend, found, layers)
        for seam in found:
            seam.install()
    return opt_in


def _not_loaded(model_type: str, saved_with: str | None, why: str) -> PadfreeError:
    return PadfreeError(
        f"a patched {model_type} model was pickled as a whole with transformers {saved_with or 'unknown'}; {why}. "
        "Load it where it was saved and save its weights there (save_pretrained, or its state_dict), then load those "
        "here and call padfree_patch.apply"
    )


def is_class_forward(module: nn.Module, own: object) -> bool:
    """Whether a bound method is what the class has, or had before it was wrapped or unwrapped here.

    transformers 4.52 to 4.57 leave one on each layer after a call with output_hidden_states.
    """
    if not (isinstance(own, types.MethodType) and own.__self__ is module):
        return False
    current = type(module).forward
    return own.__func__ in (current, getattr(current, ORIGINAL, current)) or hasattr(own.__func__, ORIGINAL)


def remove_unused_seams() -> None:
    """Puts every function back that no patched module needs any more.

    Runs the garbage collector while other models are patched: a model in a reference cycle would keep its seams.
    """
    with lock:
        if living:
            gc.collect()
        _remove_unneeded()


def _remove_unneeded() -> None:
    of_models = {id(opt_in.seams): opt_in.seams for opt_in in list(living)}  # most are one tuple per model
    needed = {seam for seams in of_models.values() for seam in seams}
    for seam in [seam for seam in (*installed, *waiting) if seam not in needed]:
        seam.remove()


def _one_is_gone() -> None:
    """Takes out the seams of a model that was dropped without `restore`.

    Called by the garbage collector, in the midst of anything, so it waits for no other thread: if one has the lock, or
    torch.compile makes a graph, the seams stay until the next `restore` or the next model that goes.
    """
    if graph_is_made():
        return
    if lock.acquire(blocking=False):
        try:
            _remove_unneeded()
        finally:
            lock.release()
