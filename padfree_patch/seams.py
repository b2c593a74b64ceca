"""Where upstream's functions are replaced, and how a module says that it wants that.

Functions are replaced where upstream looks them up (on the class, or in the namespace of the modeling file), by plain
functions that call straight through unless the module at hand has opted in. Opting in is one object in the module's
`__dict__`: it is copied by deepcopy, pickled with the module, and shared with DataParallel's replicas, so that all
of them stay patched. Plain functions rather than wrapt's proxies, because others take a forward apart: accelerate
calls `model.forward.__func__`, which on a proxy is the original.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from . import forward, kernel_call, masks, rope
from .forward import OPT_IN

ORIGINAL = "__padfree_original__"
"""Attribute by which our functions are told from others'."""

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place where upstream looks a function up: `name` on a class, or in the namespace of a module."""

    owner: type | str
    """A class, or a module's name."""
    name: str
    handler: str
    """Key of `_HANDLERS`."""

    def __str__(self) -> str:
        owner = self.owner if isinstance(self.owner, str) else f"{self.owner.__module__}.{self.owner.__qualname__}"
        return f"{owner}.{self.name}"

    def holder(self) -> Any:
        return importlib.import_module(self.owner) if isinstance(self.owner, str) else self.owner

    def install(self) -> None:
        with lock:
            holder, here = self.holder(), installed.setdefault(self, [])
            if any(holder is each.holder for each in here):
                return
            own = vars(holder).get(self.name, _ABSENT)
            wrapper: Any = _wrapped(getattr(holder, self.name), _HANDLERS[self.handler])
            if isinstance(own, staticmethod):
                wrapper = staticmethod(wrapper)
            here.append(Installed(holder, own, wrapper))
            setattr(holder, self.name, wrapper)

    def remove(self) -> None:
        for holder, own, wrapper in installed.pop(self):
            if vars(holder).get(self.name) is not wrapper:
                continue  # somebody wrapped it again: theirs stays, and ours in it calls straight through
            if own is _ABSENT:  # it was inherited
                delattr(holder, self.name)
            else:
                setattr(holder, self.name, own)


class Installed(NamedTuple):
    """A seam that is in place, and what it replaced."""

    holder: Any
    own: Any
    """What stood in the holder's own `vars`, or _ABSENT."""
    wrapper: Callable[..., Any]
    """What stands there now."""


lock = threading.RLock()
installed: dict[Seam, list[Installed]] = {}
"""More than one for a seam if a module of remote code was loaded again under its name."""


class OptIn:
    """Marks a module as patched. As long as one that needs a seam lives anywhere, the seam stays."""

    def __init__(self, model_type: str, backend: str, role: str, seams: tuple[Seam, ...]):
        self.model_type, self.backend, self.role, self.seams = model_type, backend, role, seams
        self.set_aside: dict[str, Any] = {}
        """What stood in the module's `__dict__` and would have gone past the patched class."""
        opted_in.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptIn:
        return OptIn(*self._facts())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, self._facts()

    def _facts(self) -> tuple[str, str, str, tuple[Seam, ...]]:
        return self.model_type, self.backend, self.role, self.seams


opted_in: weakref.WeakSet[OptIn] = weakref.WeakSet()


def _unpickled(model_type: str, backend: str, role: str, seams: tuple[Seam, ...]) -> OptIn:
    """A saved module comes back patched, in another process too."""
    with lock:
        opt_in = OptIn(model_type, backend, role, seams)
        for seam in seams:
            seam.install()
    return opt_in


def opt_in_of(module: nn.Module) -> OptIn | None:
    # Not vars(module).get: that is no guard of torch.compile, which would run another model's graph for this one.
    found: OptIn | None = getattr(module, OPT_IN, None)
    return found


def mark(module: nn.Module, opt_in: OptIn) -> None:
    own = vars(module)
    for name in ("forward", "_old_forward"):  # the second is where accelerate's hooks keep what they call
        if is_class_forward(module, own.get(name)):
            opt_in.set_aside[name] = own.pop(name)
            if name == "_old_forward":
                own[name] = types.MethodType(type(module).forward, module)
    own[OPT_IN] = opt_in


def opt_out(module: nn.Module) -> None:
    opt_in = vars(module).pop(OPT_IN, None)
    if opt_in is not None:
        vars(module).update(opt_in.set_aside)


def is_class_forward(module: nn.Module, own: Any) -> bool:
    """Whether a bound method is just what the class has, or had before it was wrapped or unwrapped here.

    transformers 4.52 to 4.57 leave one on each layer after a call with output_hidden_states.
    """
    if not (isinstance(own, types.MethodType) and own.__self__ is module):
        return False
    current = type(module).forward
    return own.__func__ in (current, getattr(current, ORIGINAL, current)) or hasattr(own.__func__, ORIGINAL)


def remove_unused_seams() -> None:
    with lock:
        if opted_in:
            gc.collect()  # models in reference cycles would keep theirs
        needed = {seam for opt_in in list(opted_in) for seam in opt_in.seams}
        for seam in [seam for seam in installed if seam not in needed]:
            seam.remove()


def _wrapped(original: Callable[..., Any], handler: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(original, args, kwargs)

    functools.update_wrapper(call, original)
    # accelerate's unwrap_model follows __wrapped__ to the innermost function and puts that on the instance: not ours.
    del call.__wrapped__  # type: ignore[attr-defined]
    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(call, ORIGINAL, original)
    return call


def _on_attention(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    opt_in = opt_in_of(args[0])
    if opt_in is None or not masks.is_packed_mask(kwargs.get("attention_mask")):
        return original(*args, **kwargs)
    return kernel_call.packed_attention(original, opt_in.model_type, opt_in.backend, args, kwargs)


def _on_model(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    opt_in = opt_in_of(args[0])
    if opt_in is None:
        return original(*args, **kwargs)
    return forward.model_forward(original, args, kwargs, is_decoder=opt_in.role == "decoder")


def _on_rotary(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if opt_in_of(args[0]) is None:
        return original(*args, **kwargs)
    return rope.rotary_forward(original, args, kwargs)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "attention": _on_attention,
    "model": _on_model,
    "rotary": _on_rotary,
    "mask": masks.build_mask,
    "alibi": masks.build_alibi,
    "flash attention": kernel_call.flash_attention_forward,
    "flash_attn": kernel_call.flash_attn_func,
}
