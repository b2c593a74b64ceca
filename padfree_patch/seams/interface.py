"""transformers' attention interface (4.48 on): the attention functions, answered where upstream looks them up.

The layers hand them queries, keys, values and the mask; if the mask is a stand-in, a varlen backend computes what the
function would. Scale, dropout and whatever makes attention special are plain arguments there.

Looked up in `ALL_ATTENTION_FUNCTIONS`, or, for eager, as `eager_attention_forward` in the modeling file. Functions for
flash-attn: `padfree_patch.seams.flash_attn`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PadfreeError
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from .kernel import PackedKernel
from .kinds import Found, class_named
from .stand_in import batch_of, find_stand_in, recipe_of

NAME = "interface"

FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"

EAGER = "eager_attention_forward"

SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Arguments that change the attention itself; a function that is answered here must not be given one."""


def find(model: nn.Module, patch: Patch) -> Found:
    users = tuple(module for module in model.modules() if patch.is_attention(module) and uses_interface(module, patch))
    seams = set()
    for namespace in {class_named(each, patch.attention).__module__ for each in users}:
        if hasattr(sys.modules[namespace], EAGER):
            seams.add(Seam(namespace, EAGER, concerns, answer))
        if "sdpa" in getattr(sys.modules[namespace], FUNCTIONS, ()):
            seams.add(Seam(f"{namespace}:{FUNCTIONS}", "sdpa", concerns, answer))
    return Found(frozenset(seams), users)


def uses_interface(module: nn.Module, patch: Patch) -> bool:
    """Whether an attention module calls the functions of the interface, and the patch leaves its forward alone."""
    if patch.attention_call is not None:
        return False
    forwards = (vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base))
    return any(_names_interface(original_of(each)) for each in forwards)


def _names_interface(function: Callable[..., Any] | None) -> bool:
    """Whether the code of a function, or of what its decorators wrap, names the mapping of the interface."""
    while function is not None:
        if FUNCTIONS in getattr(getattr(function, "__code__", None), "co_names", ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def concerns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return find_stand_in((*args, kwargs.get("attention_mask"))) is not None


@torch.compiler.disable
def answer(call: Call) -> tuple[Tensor, None]:
    """Answers an attention function: tensors (B, heads, T, D) in, (B, T, H, D) and no weights out."""
    given = call.with_defaults()
    q, k, v = given["query"], given["key"], given["value"]
    kernel = kernel_of(given)
    special = [name for name in SPECIAL if given.get(name) is not None]
    special += ["is_causal=False"] if given.get("is_causal") is False else []
    if special:
        raise PadfreeError(
            f"{kernel.owner} calls {call.original.__name__} with {', '.join(special)}, which padfree_patch does not "
            "know how to do for packed examples"
        )
    dropout = float(given.get("dropout") or 0.0)
    output = kernel.attend(q, k, v, scale=given.get("scaling"), dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


def kernel_of(given: dict[str, Any]) -> PackedKernel:
    """Returns the kernel call that an attention function is asked for, of the batch that its mask carries.

    Its arguments, by name, are the module, the query (B, H, T, D) and the mask, and from some modules position_ids.
    """
    module, q, mask = given["module"], given["query"], given["attention_mask"]
    batch = batch_of(mask, (q.shape[0], q.shape[2]), q.device, given.get("position_ids"))
    opt_in = OptIn.of(module)
    return PackedKernel(module, batch.sequences, recipe_of(mask), opt_in.backend if opt_in else "auto")
