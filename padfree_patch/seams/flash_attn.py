"""Models loaded as flash_attention_2: upstream's functions around flash-attn, and flash-attn's own.

They are answered where upstream looks them up. All but the interface's entry are called without the module, so they ask
whether a packed call is under way in this thread.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import versions
from ..errors import PadfreeError
from ..registry import Patch
from ..upstream import Arguments, Function
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from . import interface
from .kernel import PackedKernel
from .kinds import Found, class_named
from .traced_kernel import TracedKernel, is_causal, operator, tracing
from .under_way import running, under_way

NAME = "flash_attn"

_AROUND = "_flash_attention_forward"
"""Upstream's function around flash-attn, a global from 4.43 on and a method before."""


def find(model: nn.Module, patch: Patch) -> Found:
    seams = set()
    for module in model.modules():
        if not patch.is_attention(module):
            continue
        namespace = class_named(module, patch.attention).__module__
        if hasattr(type(module), _AROUND):  # until 4.42 a method, which calls flash-attn's own
            seams.add(Seam(namespace, "flash_attn_func", concerns, answer_kernel))
            continue
        for each in (namespace, "transformers.integrations.flash_attention"):
            if hasattr(sys.modules.get(each), _AROUND):
                seams.add(Seam(each, _AROUND, concerns, answer, traced=traced))
        if interface.uses_interface(module, patch):
            namespace = interface.namespace_of(module)
            seams |= interface.mapping_seams(namespace, "flash_attention_2", answer_interface, traced=traced_interface)
    return Found(frozenset(seams))


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return under_way.kernel is not None or tracing.kernel is not None


@torch.compiler.disable
def answer_interface(call: Call) -> object:
    """Answers the interface's function for flash-attn: it casts as always, and comes to `_flash_attention_forward`."""
    kernel = interface.kernel_of(call)
    with running(kernel=kernel):
        result = call.proceed()
    if not kernel.answered:
        raise PadfreeError(f"{kernel.owner}: {call.original.__name__} came to no kernel that padfree_patch knows")
    return result


def traced_interface(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers the interface's function while torch.compile traces: it comes to `traced`."""
    if operator is None or len(args) != 5 or not is_causal(args[0]):
        return NotImplemented
    tracing.kernel = kernel = TracedKernel(args[0], args[4])
    result = original(*args, **kwargs)
    tracing.kernel = None
    return result if kernel.answered else NotImplemented


def traced(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers `_flash_attention_forward` while torch.compile traces, as upstream calls it: options by name."""
    kernel = tracing.kernel
    if kernel is None or len(args) not in (4, 5) or kwargs.get("s_aux") is not None:
        return NotImplemented
    size = kwargs.get("sliding_window")
    q, k, v = args[:3]
    if (target := kwargs.get("target_dtype")) is not None and q.dtype == torch.float32:
        q, k, v = q.to(target), k.to(target), v.to(target)
    return _attend(
        kernel,
        q,
        k,
        v,
        scale=kwargs.get("softmax_scale"),
        dropout=kwargs.get("dropout", 0.0),
        softcap=kwargs.get("softcap"),
        window=size + window_surplus() if size else 0,
        causal=bool(kwargs.get("is_causal")),
    )


def answer(call: Call) -> Tensor:
    """Answers upstream's function `_flash_attention_forward` (4.43 on), whose tensors are (B, T, heads, D)."""
    given = call.with_defaults()
    q, k, v = given["query_states"], given["key_states"], given["value_states"]
    target = given.get("target_dtype")  # that of the weights, if norms were cast up
    if target is not None and q.dtype == torch.float32:
        q, k, v = (x.to(target) for x in (q, k, v))
    size = given["sliding_window"]
    return _attend(
        _kernel(),
        q,
        k,
        v,
        scale=given["softmax_scale"],
        dropout=given["dropout"],
        softcap=given["softcap"],
        window=size + window_surplus() if size else 0,
        causal=given["is_causal"] and given.get("s_aux") is None,  # an attention sink
    )


def answer_kernel(call: Call) -> Tensor:
    """Answers flash-attn's own function where attention classes call it (until 4.42)."""
    given = call.with_defaults()
    left, _ = given.get("window_size", (-1, -1))  # how many tokens a query sees beside itself; -1: all
    return _attend(
        _kernel(),
        given["q"],
        given["k"],
        given["v"],
        scale=given["softmax_scale"],
        dropout=given["dropout_p"],
        softcap=given.get("softcap"),
        window=left + 1,
        causal=given["causal"],
    )


def _kernel() -> PackedKernel:
    assert under_way.kernel is not None  # or the call would not have concerned us
    return under_way.kernel


def _attend(
    kernel: PackedKernel | TracedKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    window: int,
    causal: bool,
) -> Tensor:
    """Attends with q (B, T, H, D), k and v (B, T, K, D); returns (B, T, H, D)."""
    if not causal:
        raise PadfreeError(f"{kernel.owner} asks flash-attn for attention that is not plainly causal: not supported")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = kernel.attend(q, k, v, scale=scale, dropout=float(dropout), window=window, softcap=softcap or 0.0)
    return output.transpose(1, 2)


@torch.compiler.assume_constant_result
def window_surplus() -> int:
    """Returns what upstream's window for flash-attn has beyond the configured tokens: it was (w, w) before 4.56."""
    return 0 if versions.transformers(">=4.56") else 1
