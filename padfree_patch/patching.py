"""apply and restore: plan, check, wrap, opt in, verify, and on any failure put everything back.

How functions are wrapped and modules opt in: `padfree_patch.seams`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from . import attention, forward, masks, rope, verification, versions
from .errors import PadfreeError
from .registry import Patch, implementation_of, patch_for, pretrained_modules
from .seams import (
    ORIGINAL,
    OptIn,
    Seam,
    is_class_forward,
    lock,
    mark,
    opt_in_of,
    opt_out,
    opted_in,
    remove_unused_seams,
)

Model = TypeVar("Model", bound=nn.Module)

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
"""Values of attn_implementation whose models can be patched."""


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
    backends = {opt_in: opt_in.backend for module, _ in plan.roles if (opt_in := opt_in_of(module))}
    new = [(module, role) for module, role in plan.roles if opt_in_of(module) is None]
    try:
        with lock:  # or another thread's restore could find the seams unused in between
            for seam in plan.seams:
                seam.install()
            for module, role in new:
                mark(module, OptIn(plan.patch.model_type, backend, role, plan.seams))
        for opt_in in backends:
            opt_in.backend = backend
        verified = verify and _verify(plan.patch, model)
        _report_if_untested(plan.patch, verified=verified)
    except BaseException:
        for module, _ in new:
            if opt_in := opt_in_of(module):
                opted_in.discard(opt_in)  # the error's own frames still hold it, which would keep the seams
            opt_out(module)
        for opt_in, old in backends.items():
            opt_in.backend = old
        remove_unused_seams()
        raise
    return model


def restore(model: Model) -> Model:
    """Takes `apply` back; a model that is not patched is left as it is. Returns the same object."""
    for module in model.modules():
        opt_out(module)
    remove_unused_seams()
    return model


@contextmanager
def applied(model: Model, *, backend: str = "auto", verify: bool = True) -> Iterator[Model]:
    """`apply`, and `restore` at the end, also after an error. A model that was patched before stays as it was then."""
    before = {opt_in: opt_in.backend for module in model.modules() if (opt_in := opt_in_of(module))}
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
    return any(opt_in_of(module) for module in model.modules())


def places(model: nn.Module) -> tuple[str, ...]:
    """The functions that are wrapped for a patched model, as dotted names."""
    seams = {seam for module in model.modules() if (opt_in := opt_in_of(module)) for seam in opt_in.seams}
    return tuple(sorted(str(seam) for seam in seams))


def _report_if_untested(patch: Patch, *, verified: bool) -> None:
    """Notes in the log that this transformers is outside the tested range, or warns if the model was not checked."""
    version = versions.transformers_version()
    if versions.inside(version, patch.transformers):
        return
    untested = f"{patch.model_type} was tested on transformers {patch.transformers}, this is {version}"
    if verified:
        logging.getLogger("padfree_patch").info("%s; the check of the model itself passed", untested)
    else:
        warnings.warn(
            f"padfree_patch: {untested}. Leave verify=True, which checks the model itself",
            stacklevel=3,
        )


def _verify(patch: Patch, model: nn.Module) -> bool:
    """Returns whether the model could be checked. Raises PadfreeError if it can't run, LeakError if examples mix."""
    try:
        result = verification.verify(model)
    except PadfreeError:
        raise
    except Exception as error:
        _raise_if_upstream_fails(model)
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
        return False
    result.raise_if_leaking()
    return True


def _raise_if_upstream_fails(model: nn.Module) -> None:
    """Raises PadfreeError if the model can't run one example alone either, as it is without its patches."""
    patched = [(module, opt_in) for module in model.modules() if (opt_in := opt_in_of(module))]
    for module, _ in patched:
        opt_out(module)
    try:
        verification.run_alone(model)
    except Exception as error:
        raise PadfreeError(
            f"{type(model).__name__} fails without padfree_patch too, on an ordinary call with one example (the error "
            f"comes from transformers {versions.transformers_version()} or the model's own layers): {error!r}. So "
            "it could not be checked, and it was put back as it was. Make such a call work first, or pass "
            "verify=False if the model can run only later"
        ) from error
    finally:
        for module, opt_in in patched:
            mark(module, opt_in)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What apply would change; made and checked before anything does."""

    patch: Patch
    roles: list[tuple[nn.Module, str]]
    """Modules to opt in, each as "attention", "decoder", "head" or "rotary"."""
    seams: tuple[Seam, ...]


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
    check_no_virtual_tokens(model)
    for module, role in roles:
        if opt_in_of(module) is None:
            _check_forward(patch, module, role)
    seams = {Seam(type(module), "forward", "model" if role in ("decoder", "head") else role) for module, role in roles}
    for decoder in decoders:
        seams |= _mask_seams(patch, decoder)
    for module in attentions:
        seams |= _flash_attention_seams(patch, module)
    return _Plan(patch, roles, tuple(sorted(seams, key=str)))


def _mask_seams(patch: Patch, decoder: nn.Module) -> set[Seam]:
    owner = next(base for base in type(decoder).__mro__ if base.__name__ == patch.decoder)
    namespace = vars(sys.modules[owner.__module__])
    found = {Seam(owner.__module__, name, "mask") for name in masks.BUILDER_FUNCTIONS if name in namespace}
    found |= {Seam(owner, name, "mask") for name in masks.BUILDER_METHODS if hasattr(owner, name)}
    if not found:
        raise _changed(
            patch,
            f"{owner.__module__} has none of {', '.join(masks.BUILDER_FUNCTIONS)} and {owner.__name__} none of "
            f"{', '.join(masks.BUILDER_METHODS)}, one of which must build the attention mask",
        )
    if "build_alibi_tensor" in namespace:
        found.add(Seam(owner.__module__, "build_alibi_tensor", "alibi"))
    return found


def _flash_attention_seams(patch: Patch, attention_module: nn.Module) -> set[Seam]:
    """Where upstream looks up what computes attention in models loaded as flash_attention_2."""
    owner = next(base for base in type(attention_module).__mro__ if base.__name__ == patch.attention)
    if hasattr(type(attention_module), "_flash_attention_forward"):  # until 4.42 a method, which calls flash-attn's own
        return {Seam(owner.__module__, "flash_attn_func", "flash_attn")}
    name, namespaces = "_flash_attention_forward", (owner.__module__, "transformers.integrations.flash_attention")
    return {Seam(each, name, "flash attention") for each in namespaces if hasattr(sys.modules.get(each), name)}


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


def check_no_virtual_tokens(model: nn.Module) -> None:
    """Raises PadfreeError for PEFT's prompt tuning and its kind."""
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
    if own is not None and not is_class_forward(module, own):
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
