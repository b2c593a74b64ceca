"""autopatch: transformers' functions that make models and begin trainings are entered as soon as they are imported.

Plain functions, as in seams: ms-swift's loader takes `PreTrainedModel.from_pretrained.__func__`, calls it, and puts
`classmethod(__func__)` back. Behind a proxy of wrapt's it found the original: the model inside came out unpatched, and
the hook was gone, both silently. Imports neither torch nor transformers by itself.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from ..wrapping.later_imports import when_imported
from .options import Options

if TYPE_CHECKING:
    from torch import nn
    from transformers.trainer_callback import CallbackHandler

_MAKERS = ("from_pretrained", "_from_config")
"""Class methods of PreTrainedModel of which every way that makes a model of a name or a config ends in one."""


class Autopatch:
    """What `autopatch` returns. As a context manager, it removes the hooks at the end."""

    def __init__(self, options: Options):
        self.options = options
        self._patched: list[weakref.ref[nn.Module]] = []
        self._hooks: list[_Hook] = []
        self._removed = False

    @property
    def models(self) -> list[nn.Module]:
        """Returns the models that were patched and still live, in the order in which they were made."""
        return [model for each in self._patched if (model := each()) is not None]

    def note(self, model: nn.Module) -> None:
        """Adds a model that was patched."""
        self._patched.append(weakref.ref(model))

    def remove(self) -> None:
        """Takes the hooks out. Models stay patched, and are still verified at their first packed training call."""
        self._removed = True
        while self._hooks:
            self._hooks.pop().remove()

    def install(self) -> None:
        """Enters transformers, now or as soon as it is imported."""
        when_imported("transformers.modeling_utils", self._enter_models)
        when_imported("transformers.trainer_callback", self._enter_trainings)

    def _enter_models(self, module: ModuleType) -> None:
        if not self._removed:
            self._hooks += [_Hook(module.PreTrainedModel, name, self._made) for name in _MAKERS]

    def _enter_trainings(self, module: ModuleType) -> None:
        if not self._removed:
            self._hooks.append(_Hook(module.CallbackHandler, "on_train_begin", self._training_begins))

    def _made(self, call: Callable[[], object], owner: object) -> object:
        """Makes a model; patches it, unless it is made inside of another one."""
        outermost, _under_way.making = not _under_way.making, True
        try:
            result = call()
        finally:
            if outermost:
                _under_way.making = False
        if outermost:
            self._arrived(result[0] if isinstance(result, tuple) and result else result)
        return result

    def _arrived(self, made: object) -> None:
        from .arriving import arrived

        if arrived(made, self.options):
            self.note(made)

    def _training_begins(self, call: Callable[[], object], owner: CallbackHandler) -> object:
        from .training import training_begins

        training_begins(owner.model, self)
        return call()

    def __enter__(self) -> Autopatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _UnderWay(threading.local):
    making = False


_under_way = _UnderWay()

_Around = Callable[[Callable[[], object], object], object]
"""What runs instead of a function: it is given the call, to be made once, and the object that it is made on."""


class _Hook:
    """A method of a class, with something of ours around it."""

    def __init__(self, owner: type, name: str, around: _Around):
        self._owner, self._name = owner, name
        self._around: _Around | None = around
        self._own = own = vars(owner)[name]
        of_class = isinstance(own, classmethod)

        def function(given: object, /, *args: object, **kwargs: object) -> object:
            bound = own.__get__(None, given) if of_class else own.__get__(given)
            call = functools.partial(bound, *args, **kwargs)
            return call() if self._around is None else self._around(call, given)

        self._function = functools.update_wrapper(function, getattr(own, "__func__", own))
        setattr(owner, name, classmethod(function) if of_class else function)

    def remove(self) -> None:
        """Puts back what was there, unless somebody has wrapped ours since: then theirs stays, and ours passes on."""
        self._around = None
        there = vars(self._owner).get(self._name)
        if getattr(there, "__func__", there) is self._function:
            setattr(self._owner, self._name, self._own)


def autopatch(*, backend: str = "auto", strict: bool = True) -> Autopatch:
    """Patches every model that transformers makes in this process from now on, for code that makes its models itself.

    A model that `from_pretrained` or `from_config` makes is patched at once. It is verified (`padfree_patch.verify`)
    where its training begins, on the device and with the backend that trains: when a transformers Trainer begins, or
    at its first packed training call. Then one line on rank 0 says so. A model that can't be patched is left alone,
    with a line that says why.

    Args:
        backend: as in `padfree_patch.apply`.
        strict: whether the first packed training row of a model that was left alone is an error; a warning if not.

    Returns a handle: `.models` lists the patched models, `.remove()` takes the hooks out. In a `with` statement the
    hooks are removed at the end. Models stay patched.

    Raises PadfreeError if there is no such backend. Later, in the training: `LeakError` if a model's examples mix.
    """
    from .. import attention

    attention.check_name(backend)
    return open_door(str(Options(backend, strict)))


def open_door(options: str) -> Autopatch:
    """Does the same with what `padfree-patch run` has written into its variable. Imports no torch yet."""
    handle = Autopatch(Options.read(options))
    handle.install()
    return handle
