"""Seam: a place where upstream looks a function up, and what answers there instead."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..upstream import Arguments, Function
from .call import Call, cannot_be_bound
from .frames import frames_are_compiled, is_tracing, outside_graphs, runs_uncompiled
from .later_imports import when_imported

ORIGINAL = "__padfree_original__"
"""Attribute by which our functions are told from others'."""

_ABSENT = object()

_CLASS = "class "
"""Before the name of a class in `Seam.owner`, while it is pickled."""

Concerns = Callable[[tuple[object, ...], Arguments], bool]
Answer = Callable[[Call], object]
Traced = Callable[[Function, tuple[Any, ...], Arguments], object]
"""An answer that torch.compile traces, given the function itself and the arguments of the call.

NotImplemented where it can't trace one: then the graph breaks, and `answer` answers."""
Holder = type | types.ModuleType | dict[str, Any]
"""What has a function under a name: a class, a module, or a mapping."""


@dataclasses.dataclass(frozen=True)
class Seam:
    """A function `name` of a class, of the namespace of a module, or of a mapping in a module's namespace.

    Its functions are pickled by name, with the models that need the seam.
    """

    owner: type | str
    """A class, a module's name, or "module:NAME" of a mapping there."""
    name: str
    """Attribute of the class or module, or key of the mapping."""
    concerns: Concerns
    """Whether a call, as (args, kwargs), is to be answered; every other call goes straight through. Traced by
    torch.compile."""
    answer: Answer
    """What happens instead of the function itself."""
    takes: tuple[str, ...] = ()
    """Names of arguments that the wrapper takes beside the function's own, and shows in its signature."""
    optional: bool = False
    """Whether the place may be missing: it is wrapped as soon as somebody imports it, and left alone before."""
    traced: Traced | None = None
    """What happens there while torch.compile traces; None if the graph always breaks there."""

    def __str__(self) -> str:
        if isinstance(self.owner, str):
            module, _, mapping = self.owner.partition(":")
            return f"{module}.{mapping}[{self.name!r}]" if mapping else f"{module}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    def by_name(self) -> Seam:
        """Returns the same seam with a class of transformers by its name, to be pickled.

        Pickle misses a class that is gone with an AttributeError; classes of others, it may have to pickle by value.
        """
        owner = self.owner
        if isinstance(owner, str) or not owner.__module__.startswith("transformers."):
            return self
        return dataclasses.replace(self, owner=f"{owner.__module__}:{_CLASS}{owner.__qualname__}")

    def with_its_class(self) -> Seam:
        """Returns the same seam with the class that `by_name` named; AttributeError or ImportError without it."""
        module, named, name = self.owner.partition(f":{_CLASS}") if isinstance(self.owner, str) else ("", "", "")
        return dataclasses.replace(self, owner=_attribute(module, name)) if named else self

    def install(self) -> None:
        """Wraps the function that stands there; does nothing if that is our wrapper already."""
        with lock:
            if self._is_missing():
                waiting.add(self)
                _wait_for(self.module)
                return
            holder, here = _holder(self.owner, self.name), installed.setdefault(self, [])
            own = _own_entries(holder).get(self.name, _ABSENT)
            if any(holder is each.holder and own is each.wrapper for each in here):
                return
            current = holder[self.name] if isinstance(holder, dict) else getattr(holder, self.name)
            wrapper: Function = wrapped(current, self.concerns, self.answer, self.takes, self.traced)
            if isinstance(own, staticmethod):
                wrapper = staticmethod(wrapper)
            here.append(Installed(holder, own, wrapper))
            _put(holder, self.name, wrapper)

    def remove(self) -> None:
        """Puts back what the wrapper replaced, and its absence if it was inherited."""
        waiting.discard(self)
        for holder, own, wrapper in reversed(installed.pop(self, [])):
            if _own_entries(holder).get(self.name) is wrapper:
                _put(holder, self.name, own)
            else:  # somebody wrapped it again: theirs stays, and ours in it calls straight through
                _pass_on(holder, wrapper, own)

    def replacement(self) -> object:
        """Returns what is there instead of our wrapper ("nothing" if it was deleted); None if ours is there."""
        if self._is_missing():
            return None
        holder = _holder(self.owner, self.name)
        there = _own_entries(holder).get(self.name, "nothing")
        return None if any(there is each.wrapper for each in installed.get(self, ())) else there

    @property
    def module(self) -> str:
        """Name of the module that the place is in."""
        return self.owner.partition(":")[0] if isinstance(self.owner, str) else self.owner.__module__

    def _is_missing(self) -> bool:
        """Whether nobody has imported the place, or this version of the library has none."""
        if not self.optional or not isinstance(self.owner, str):
            return False
        return not hasattr(sys.modules.get(self.module), self.owner.partition(":")[2] or self.name)


class Installed(NamedTuple):
    """A seam that is in place, and what it replaced."""

    holder: Holder
    own: object
    """What the holder itself had under the name, or _ABSENT."""
    wrapper: Function
    """What it has there now."""


lock = threading.RLock()
installed: dict[Seam, list[Installed]] = {}
"""More than one for a seam if a module of remote code was loaded again under its name, or if somebody replaced our
wrapper and the seam was installed again: the newest is last."""

waiting: set[Seam] = set()
"""Optional seams that models need, and that nobody has imported yet."""

_awaited: set[str] = set()
"""Modules that wrapt was asked to wait for: it forgets one when it is imported, and can't be told to."""


def _wait_for(module: str) -> None:
    if module not in sys.modules and module not in _awaited:
        _awaited.add(module)
        when_imported(module, _install_waiting)


def _install_waiting(module: types.ModuleType) -> None:
    with lock:
        _awaited.discard(module.__name__)
        for seam in [each for each in waiting if each.module == module.__name__]:
            waiting.discard(seam)
            seam.install()


def wrapped(
    original: Function,
    concerns: Concerns,
    answer: Answer,
    takes: tuple[str, ...] = (),
    traced: Traced | None = None,
) -> Function:
    """Returns a plain function that answers the calls which concern us and passes all others on."""

    def call(*args: object, **kwargs: object) -> object:
        if not is_tracing() and frames_are_compiled():
            made = outside_graphs(_call_of, original, concerns, args, kwargs)
            return original(*args, **kwargs) if made is None else answer(made)
        if not concerns(args, kwargs):
            return original(*args, **kwargs)
        if traced is not None and is_tracing():
            answered = traced(original, args, kwargs)
            if answered is not NotImplemented:
                return answered
        if cannot_be_bound(original, args, kwargs):
            return original(*args, **kwargs)
        return answer(Call(original, args, kwargs))

    functools.update_wrapper(call, original)
    call.__wrapped__ = _Shown(call, original)  # type: ignore[attr-defined]
    call.__signature__ = _with_keywords(inspect.signature(original), takes)  # type: ignore[attr-defined]
    setattr(call, ORIGINAL, original)
    return call


def _call_of(original: Function, concerns: Concerns, args: tuple[object, ...], kwargs: Arguments) -> Call | None:
    """Returns a call that concerns us, or None."""
    if not concerns(args, kwargs) or cannot_be_bound(original, args, kwargs):
        return None
    return Call(original, args, kwargs)


class _Shown:
    """What our wrapper shows under itself: upstream's code to look at, but who calls it calls the wrapper.

    torch.fx takes the names of arguments from the code under all wrappers. accelerate's unwrap_model puts what it finds
    there on the instance, where upstream's function would go past us.
    """

    def __init__(self, wrapper: Function, original: Function):
        functools.update_wrapper(self, original)
        del self.__wrapped__  # type: ignore[attr-defined]
        self._wrapper, self.__code__ = wrapper, _shown_code(original)
        self.__signature__ = inspect.signature(original)
        setattr(self, ORIGINAL, original)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._wrapper(*args, **kwargs)


def _shown_code(function: Function) -> types.CodeType | None:
    """Returns the code under all wrappers, of a plain function without its `*args`, keyword-only names and `**kwargs`.

    For these torch.fx would give the outermost function, ours, the number of arguments of the code that it looked at.
    Decorated functions of upstream fail at that by themselves.
    """
    code: types.CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or inspect.unwrap(function) is not function:
        return code
    flags = code.co_flags & ~(inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.replace(co_flags=flags, co_kwonlyargcount=0)


def _with_keywords(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    """Returns a signature with more keyword arguments, None by default; as it is without names."""
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    *before, last = signature.parameters.values()
    any_keyword = [last] if last.kind is last.VAR_KEYWORD else []
    return signature.replace(parameters=[*before, *([] if any_keyword else [last]), *more, *any_keyword])


_WRAPPER_CODE = runs_uncompiled(wrapped(lambda *_: None, lambda args, kwargs: False, lambda call: None)).__code__


def is_wrapper(function: object) -> bool:
    """Whether a function, bound or not, is one of our wrappers, or what one shows under itself.

    What `functools.wraps` makes of one is not.
    """
    function = getattr(function, "__func__", function)
    return isinstance(function, _Shown) or getattr(function, "__code__", None) is _WRAPPER_CODE


def original_of(function: Function) -> Function:
    """Returns what one of our wrappers wraps; any other function as it is."""
    return getattr(function, ORIGINAL, function)


def _holder(owner: type | str, name: str) -> Holder:
    """Returns the class, module or dictionary that has the function.

    transformers' mappings (4.53 on) keep what every instance has apart from what one instance has been given.
    """
    if not isinstance(owner, str):
        return owner
    module, _, mapping = owner.partition(":")
    # Not import_module at once, which waits for another thread that imports it now, and that may wait for our lock.
    holder = sys.modules.get(module) or importlib.import_module(module)
    if not mapping:
        return holder
    found = getattr(holder, mapping)
    if name in getattr(found, "_local_mapping", ()):
        return found._local_mapping
    return getattr(found, "_global_mapping", found)


def _attribute(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _own_entries(holder: Holder) -> Mapping[str, object]:
    """Returns what the holder itself has, by name."""
    return holder if isinstance(holder, dict) else vars(holder)


def _pass_on(holder: Holder, wrapper: Function, own: object) -> None:
    """Gives what a wrapper replaced to the seam, if any, that replaced the wrapper, to put back in its place."""
    for here in installed.values():
        here[:] = [each._replace(own=own) if each.holder is holder and each.own is wrapper else each for each in here]


def _put(holder: Holder, name: str, value: object) -> None:
    if isinstance(holder, dict):
        holder[name] = value  # never absent before: a key is wrapped only where it is
    elif value is _ABSENT:
        delattr(holder, name)
    else:
        setattr(holder, name, value)
