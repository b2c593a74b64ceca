"""transformers' attention interface (4.48 on): the attention functions, answered where upstream looks them up.

The layers hand them queries, keys, values and the mask; if the mask is a stand-in, a varlen backend computes what the
function would. Scale, dropout and whatever makes attention special are plain arguments there.

Looked up in `ALL_ATTENTION_FUNCTIONS`, or, for eager, as `eager_attention_forward` in the modeling file. Functions for
flash-attn: `padfree_patch.seams.flash_attn`.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PadfreeError
from ..models import implementation_of
from ..registry import Patch
from ..upstream import Arguments, Function
from ..wrapping.call import Call, signature
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Answer, Concerns, Seam, Traced, original_of
from .kernel import PackedKernel
from .kinds import Found
from .stand_in import batch_of, is_stand_in, recipe_of
from .traced_kernel import TracedKernel, is_causal, operator

NAME = "interface"

FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"

EAGER = "eager_attention_forward"

SINKS = ("s_aux", "sinks")
"""What the functions call sinks: one more logit of each head in every softmax."""

SPECIAL = (*SINKS, "position_bias", "head_mask")
"""Arguments that change the attention itself; a function that is answered here must not be given one."""


def find(model: nn.Module, patch: Patch) -> Found:
    users = tuple(module for module in model.modules() if patch.is_attention(module) and uses_interface(module, patch))
    seams = set()
    for namespace in {namespace_of(each) for each in users}:
        if hasattr(sys.modules[namespace], EAGER):
            eager = getattr(sys.modules[namespace], EAGER)
            seams.add(Seam(namespace, EAGER, is_answered, answer, traced=_traced_for(eager)))
        seams |= mapping_seams(namespace, "sdpa", answer, traced=traced)
    return Found(frozenset(seams), users)


def _traced_for(function: Function) -> Traced:
    return traced_with_softcap if "softcap" in signature(original_of(function)).parameters else traced


def mapping_seams(
    namespace: str,
    implementation: str,
    answer: Answer,
    concerns: Concerns | None = None,
    traced: Traced | None = None,
) -> set[Seam]:
    """Returns the seam of one entry of the mapping that a modeling file looks functions up in; none if it lacks it."""
    mapping = getattr(sys.modules[namespace], FUNCTIONS)
    if implementation not in mapping:
        return set()
    # Named after the file that all others have it from: the entry of one mapping must be one seam.
    shared = mapping is getattr(sys.modules["transformers.modeling_utils"], FUNCTIONS, None)
    owner = "transformers.modeling_utils" if shared else namespace
    return {Seam(f"{owner}:{FUNCTIONS}", implementation, concerns or is_answered, answer, traced=traced)}


def uses_interface(module: nn.Module, patch: Patch) -> bool:
    """Whether the forward of an attention module calls the functions of the interface, where they can be answered.

    Asks the forward that runs: a subclass may bypass what its base uses. Not if the patch changes the calls of the
    forward itself (`Patch.attention_call`), nor if eager's function is no global of the file that calls it.
    """
    return patch.attention_call is None and can_be_answered(module)


def can_be_answered(module: nn.Module) -> bool:
    """Whether a module calls the functions of the interface where they can be answered."""
    caller = caller_of(module)
    if caller is None:
        return False
    config = getattr(module, "config", None)
    return EAGER in caller.__globals__ or (config is not None and implementation_of(config) != "eager")


def namespace_of(module: nn.Module) -> str:
    """Returns the name of the file whose code calls the interface for a module that uses it."""
    caller = caller_of(module)
    assert caller is not None
    name: str = caller.__globals__["__name__"]
    return name


def caller_of(module: nn.Module) -> FunctionType | None:
    """Returns the function, under a forward's decorators, whose code names the mapping of the interface, or None."""
    function: Function | None = original_of(type(module).forward)
    while function is not None:
        if isinstance(function, FunctionType) and FUNCTIONS in function.__code__.co_names:
            return function
        function = getattr(function, "__wrapped__", None)
    return None


def is_answered(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return is_stand_in(args[4] if len(args) > 4 else kwargs.get("attention_mask"))


@torch.compiler.disable
def answer(call: Call) -> tuple[Tensor, None]:
    """Answers an attention function: tensors (B, heads, T, D) in, (B, T, H, D) and no weights out."""
    given = call.with_defaults()
    _, q, k, v, _ = (given[name] for name in call.names[:5])
    kernel = kernel_of(call)
    special = [name for name in SPECIAL if given.get(name) is not None]
    special += ["is_causal=False"] if given.get("is_causal") is False else []
    if special:
        raise PadfreeError(
            f"{kernel.owner} calls {call.original.__name__} with {', '.join(special)}, which padfree_patch does not "
            "know how to do for packed examples"
        )
    dropout = float(given.get("dropout") or 0.0)
    softcap = float((given.get("softcap") or 0.0) if "softcap" in call.names else 0.0)  # upstream's sdpa ignores it
    output = kernel.attend(q, k, v, scale=given.get("scaling"), dropout=dropout, softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


def kernel_of(call: Call) -> PackedKernel:
    """Returns the kernel call that an attention function is asked for, of the batch that its mask carries.

    Its first five arguments are the module, query (B, H, T, D), key, value and mask; some modules pass position_ids.
    """
    module, q, _, _, mask = (call.arguments[name] for name in call.names[:5])
    batch = batch_of(mask, (q.shape[0], q.shape[2]), q.device, call.arguments.get("position_ids"))
    opt_in = OptIn.of(module)
    return PackedKernel(module, batch.sequences, recipe_of(mask), opt_in.backend if opt_in else "auto")


def traced(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers while torch.compile traces, in place of a function that knows no softcap."""
    return _by_operator(args, kwargs, softcap=0.0)


def traced_with_softcap(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers while torch.compile traces, in place of a function that has a parameter for the softcap."""
    return _by_operator(args, kwargs, softcap=float(kwargs.get("softcap") or 0.0))


def _by_operator(args: tuple[Any, ...], kwargs: Arguments, *, softcap: float) -> object:
    """Returns what one operator of the graph gives; NotImplemented for a call that is not plain."""
    special = any(kwargs.get(name) is not None for name in SPECIAL) or kwargs.get("is_causal") is False
    if operator is None or len(args) != 5 or special or not is_causal(args[0]):
        return NotImplemented
    module, q, k, v, mask = args
    dropout = float(kwargs.get("dropout") or 0.0)
    output = TracedKernel(module, mask).attend(q, k, v, scale=kwargs.get("scaling"), dropout=dropout, softcap=softcap)
    return output.transpose(1, 2), None
