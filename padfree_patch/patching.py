"""apply and restore: plan, check, wrap, opt in, verify, and on any failure put everything back.

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
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import nn

from . import attention, forward, kernel_call, masks, rope, verification, versions
from .errors import PadfreeError
from .forward import OPT_IN
from .registry import Patch, implementation_of, patch_for, pretrained_modules

Model = TypeVar("Model", bound=nn.Module)

ORIGINAL = "__padfree_original__"
"""Attribute by which our functions are told from others'."""

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
"""Values of attn_implementation whose models can be patched."""

_ABSENT = object()


def apply(model: Model, *, backend: str = "auto", verify: bool = True) -> Model:
    """Makes `model` train each example of a packed batch as if it stood alone. Changes nothing else about it.

    Args:
        model: a transformers model, also inside PEFT, DDP, FSDP or a compiled module.
        backend: "auto" takes the fastest that can do what a call needs; see `padfree_patch.attention.BACKENDS`.
        verify: check on the model itself that examples do not mix (`padfree_patch.verify`).

    Returns the same object. Applying twice is applying once, with the newer backend.

    Raises PadfreeError, with the model as it was, if there is no patch for it, upstream's code is not what the patch
    was made for, or the check finds that examples still mix (`LeakError`).
    """
    attention.check_name(backend)
    plan = _plan(model)
    _warn_if_untested(plan.patch)
    backends = {opt_in: opt_in.backend for module, _ in plan.roles if (opt_in := _opt_in_of(module))}
    new = [(module, role) for module, role in plan.roles if _opt_in_of(module) is None]
    try:
        with _lock:  # or another thread's restore could find the seams unused in between
            for seam in plan.seams:
                seam.install()
            for module, role in new:
                _opt_in(module, _OptIn(plan.patch.model_type, backend, role, plan.seams))
        for opt_in in backends:
            opt_in.backend = backend
        if verify:
            _verify(plan.patch, model)
    except BaseException:
        for module, _ in new:
            if mark := _opt_in_of(module):
                _opted_in.discard(mark)  # the error's own frames still hold it, which would keep the seams
            _opt_out(module)
        for opt_in, old in backends.items():
            opt_in.backend = old
        _remove_unused_seams()
        raise
    return model


def restore(model: Model) -> Model:
    """Takes `apply` back; a model that is not patched is left as it is. Returns the same object."""
    for module in model.modules():
        _opt_out(module)
    _remove_unused_seams()
    return model


@contextmanager
def applied(model: Model, *, backend: str = "auto", verify: bool = True) -> Iterator[Model]:
    """`apply`, and `restore` at the end, also after an error. A model that was patched before stays as it was then."""
    before = {opt_in: opt_in.backend for module in model.modules() if (opt_in := _opt_in_of(module))}
    apply(model, backend=backend, verify=verify)
    try:
        yield model
    finally:
        if not before:
            restore(model)
        for opt_in, old in before.items():
            opt_in.backend = old


def is_applied(model: nn.Module) -> bool:
    """Whether any module of the model is patched."""
    return any(_opt_in_of(module) for module in model.modules())


def places(model: nn.Module) -> tuple[str, ...]:
    """The functions that are wrapped for a patched model, as dotted names."""
    seams = {seam for module in model.modules() if (opt_in := _opt_in_of(module)) for seam in opt_in.seams}
    return tuple(sorted(str(seam) for seam in seams))


def _warn_if_untested(patch: Patch) -> None:
    version = versions.transformers_version()
    if not versions.inside(version, patch.transformers):
        warnings.warn(
            f"padfree_patch: {patch.model_type} was tested on transformers {patch.transformers}, this is {version}. "
            "Leave verify=True, which checks the model itself, and tell us whether it passed",
            stacklevel=3,
        )


def _verify(patch: Patch, model: nn.Module) -> None:
    try:
        result = verification.verify(model)
    except PadfreeError:
        raise
    except Exception as error:
        raise PadfreeError(
            f"{patch.model_type}: the patched model can't run a packed row: {error!r} on transformers "
            f"{versions.transformers_version()} (patch tested on {patch.transformers}); it was put back as it was"
        ) from error
    if result.skipped:
        warnings.warn(
            f"padfree_patch.apply could not check its work: {result.skipped}. "
            "Call padfree_patch.verify(model) once the weights are there, or pass verify=False",
            stacklevel=3,
        )
    else:
        result.raise_if_leaking()


@dataclasses.dataclass(frozen=True)
class _Seam:
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
        with _lock:
            holder, installed = self.holder(), _installed.setdefault(self, [])
            if any(holder is each.holder for each in installed):
                return
            own = vars(holder).get(self.name, _ABSENT)
            wrapper: Any = _wrapped(getattr(holder, self.name), _HANDLERS[self.handler])
            if isinstance(own, staticmethod):
                wrapper = staticmethod(wrapper)
            installed.append(_Installed(holder, own, wrapper))
            setattr(holder, self.name, wrapper)

    def remove(self) -> None:
        for holder, own, wrapper in _installed.pop(self):
            if vars(holder).get(self.name) is not wrapper:
                continue  # somebody wrapped it again: theirs stays, and ours in it calls straight through
            if own is _ABSENT:  # it was inherited
                delattr(holder, self.name)
            else:
                setattr(holder, self.name, own)


class _Installed(NamedTuple):
    holder: Any
    own: Any
    """What stood in the holder's own `vars`, or _ABSENT."""
    wrapper: Callable[..., Any]
    """What stands there now."""


_lock = threading.RLock()
_installed: dict[_Seam, list[_Installed]] = {}
"""More than one for a seam if a module of remote code was loaded again under its name."""


class _OptIn:
    """Marks a module as patched. As long as one that needs a seam lives anywhere, the seam stays."""

    def __init__(self, model_type: str, backend: str, role: str, seams: tuple[_Seam, ...]):
        self.model_type, self.backend, self.role, self.seams = model_type, backend, role, seams
        self.set_aside: dict[str, Any] = {}
        """What stood in the module's `__dict__` and would have gone past the patched class."""
        _opted_in.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OptIn:
        return _OptIn(*self._facts())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, self._facts()

    def _facts(self) -> tuple[str, str, str, tuple[_Seam, ...]]:
        return self.model_type, self.backend, self.role, self.seams


_opted_in: weakref.WeakSet[_OptIn] = weakref.WeakSet()


def _unpickled(model_type: str, backend: str, role: str, seams: tuple[_Seam, ...]) -> _OptIn:
    """A saved module comes back patched, in another process too."""
    with _lock:
        opt_in = _OptIn(model_type, backend, role, seams)
        for seam in seams:
            seam.install()
    return opt_in


def _opt_in_of(module: nn.Module) -> _OptIn | None:
    # Not vars(module).get: that is no guard of torch.compile, which would run another model's graph for this one.
    found: _OptIn | None = getattr(module, OPT_IN, None)
    return found


def _opt_in(module: nn.Module, opt_in: _OptIn) -> None:
    own = vars(module)
    for name in ("forward", "_old_forward"):  # the second is where accelerate's hooks keep what they call
        if _is_class_forward(module, own.get(name)):
            opt_in.set_aside[name] = own.pop(name)
            if name == "_old_forward":
                own[name] = types.MethodType(type(module).forward, module)
    own[OPT_IN] = opt_in


def _opt_out(module: nn.Module) -> None:
    opt_in = vars(module).pop(OPT_IN, None)
    if opt_in is not None:
        vars(module).update(opt_in.set_aside)


def _is_class_forward(module: nn.Module, own: Any) -> bool:
    """Whether a bound method is just what the class has, or had before it was wrapped or unwrapped here.

    transformers 4.52 to 4.57 leave one on each layer after a call with output_hidden_states.
    """
    if not (isinstance(own, types.MethodType) and own.__self__ is module):
        return False
    current = type(module).forward
    return own.__func__ in (current, getattr(current, ORIGINAL, current)) or hasattr(own.__func__, ORIGINAL)


def _remove_unused_seams() -> None:
    with _lock:
        if _opted_in:
            gc.collect()  # models in reference cycles would keep theirs
        needed = {seam for opt_in in list(_opted_in) for seam in opt_in.seams}
        for seam in [seam for seam in _installed if seam not in needed]:
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
    opt_in = _opt_in_of(args[0])
    if opt_in is None or not masks.is_packed_mask(kwargs.get("attention_mask")):
        return original(*args, **kwargs)
    return kernel_call.packed_attention(original, opt_in.model_type, opt_in.backend, args, kwargs)


def _on_model(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    opt_in = _opt_in_of(args[0])
    if opt_in is None:
        return original(*args, **kwargs)
    return forward.model_forward(original, args, kwargs, is_decoder=opt_in.role == "decoder")


def _on_rotary(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _opt_in_of(args[0]) is None:
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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What apply would change; made and checked before anything does."""

    patch: Patch
    roles: list[tuple[nn.Module, str]]
    """Modules to opt in, each as "attention", "decoder", "head" or "rotary"."""
    seams: tuple[_Seam, ...]


def _plan(model: nn.Module) -> _Plan:
    """Raises PadfreeError if upstream's code is not what the patch was made for."""
    patch = patch_for(model)
    models = pretrained_modules(model)
    decoders = [module for module in models if patch.is_decoder(module)]
    attentions = [module for module in model.modules() if patch.is_attention(module)]
    rotaries = [module for module in model.modules() if rope.depends_on_length(module)]
    _check_found(patch, model, patch.decoder, decoders)
    _check_found(patch, model, patch.attention, attentions)
    _check_config(patch, decoders)
    roles = [(module, "decoder" if module in decoders else "head") for module in models]
    roles += [(module, "attention") for module in attentions]
    roles += [(module, "rotary") for module in rotaries]
    _check_no_virtual_tokens(model)
    for module, role in roles:
        if _opt_in_of(module) is None:
            _check_forward(patch, module, role)
    seams = {_Seam(type(module), "forward", "model" if role in ("decoder", "head") else role) for module, role in roles}
    for decoder in decoders:
        seams |= _mask_seams(patch, decoder)
    for module in attentions:
        seams |= _flash_attention_seams(patch, module)
    return _Plan(patch, roles, tuple(sorted(seams, key=str)))


def _mask_seams(patch: Patch, decoder: nn.Module) -> set[_Seam]:
    owner = next(base for base in type(decoder).__mro__ if base.__name__ == patch.decoder)
    namespace = vars(sys.modules[owner.__module__])
    found = {_Seam(owner.__module__, name, "mask") for name in masks.BUILDER_FUNCTIONS if name in namespace}
    found |= {_Seam(owner, name, "mask") for name in masks.BUILDER_METHODS if hasattr(owner, name)}
    if not found:
        raise _changed(
            patch,
            f"{owner.__module__} has none of {', '.join(masks.BUILDER_FUNCTIONS)} and {owner.__name__} none of "
            f"{', '.join(masks.BUILDER_METHODS)}, one of which must build the attention mask",
        )
    if "build_alibi_tensor" in namespace:
        found.add(_Seam(owner.__module__, "build_alibi_tensor", "alibi"))
    return found


def _flash_attention_seams(patch: Patch, attention_module: nn.Module) -> set[_Seam]:
    """Where upstream looks up what computes attention in models loaded as flash_attention_2."""
    owner = next(base for base in type(attention_module).__mro__ if base.__name__ == patch.attention)
    if hasattr(type(attention_module), "_flash_attention_forward"):  # until 4.42 a method, which calls flash-attn's own
        return {_Seam(owner.__module__, "flash_attn_func", "flash_attn")}
    name, namespaces = "_flash_attention_forward", (owner.__module__, "transformers.integrations.flash_attention")
    return {_Seam(each, name, "flash attention") for each in namespaces if hasattr(sys.modules.get(each), name)}


def _check_found(patch: Patch, model: nn.Module, wanted: str, found: list[nn.Module]) -> None:
    if not found:
        names = sorted({type(module).__name__ for module in model.modules()})
        code = type(pretrained_modules(model)[0]).__module__
        raise _changed(
            patch, f"no module of class {wanted} in {type(model).__name__} (from {code}); found {', '.join(names)}"
        )


def _check_config(patch: Patch, decoders: list[nn.Module]) -> None:
    for decoder in decoders:
        config: Any = decoder.config
        if (implementation := implementation_of(config)) not in IMPLEMENTATIONS:
            raise PadfreeError(
                f"{patch.model_type}: loaded with attention implementation {implementation!r}; load it with one of "
                f"{', '.join(IMPLEMENTATIONS)} (padfree_patch picks the kernel of packed batches itself)"
            )


def _check_no_virtual_tokens(model: nn.Module) -> None:
    for module in model.modules():
        config = getattr(module, "active_peft_config", None)  # of a PeftModel
        if getattr(config, "is_prompt_learning", False):
            raise PadfreeError(
                f"{type(module).__name__} with {type(config).__name__} puts virtual tokens before each row, where only "
                "the first example of a packed row could see them; train it on padded batches"
            )


def _check_forward(patch: Patch, module: nn.Module, role: str) -> None:
    """That the module's forward takes what the patch gives it, and that a patch of its class reaches it."""
    function, name = type(module).forward, type(module).__name__
    function = getattr(function, ORIGINAL, function)
    rotary_takes = ("query", "key") if forward.takes_keyword(function, "query") else ("x",)  # Falcon's of 4.35
    for wanted in ("attention_mask", "position_ids") if role != "rotary" else rotary_takes:
        if not forward.takes_keyword(function, wanted):
            has = ", ".join(list(forward.signature(function).parameters)[1:])
            raise _changed(patch, f"{name}.forward has no parameter {wanted}; it has {has}")
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is not None and not _is_class_forward(module, own):
        raise PadfreeError(
            f"{name}.forward is replaced on the instance by {getattr(own, '__qualname__', type(own).__name__)}, "
            "so that a patch of the class would not reach it; "
            "call padfree_patch.apply before what replaces it (accelerator.prepare, torch.compile of a forward)"
        )


def _changed(patch: Patch, what: str) -> PadfreeError:
    return PadfreeError(
        f"{patch.model_type}: {what} in transformers {versions.transformers_version()} "
        f"(patch tested on {patch.transformers})"
    )
