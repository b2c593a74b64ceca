"""Attention modules that compute their kernel themselves: before 4.48, and wherever one bypasses the interface.

Upstream's own forward runs, with only its kernel call answered. Projections, rotary, norms, clipping and the output
projection stay upstream's, whatever the version. A torch-function mode around the one call sees the torch functions
that it uses, and answers two of them: `scaled_dot_product_attention`, and the `matmul(q, k.T) ... softmax ...
matmul(weights, v)` of eager attention, whose T x T scores are never computed (`padfree_patch.seams.scores`). Other
threads and other models see nothing, and a function that is not understood is an error that names it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..registry import AttentionCall, Patch, registry
from ..upstream import Arguments, Function
from ..wrapping.call import Call, signature
from ..wrapping.frames import is_tracing
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from . import rotary as rotaries
from .interface import uses_interface
from .kernel import PackedKernel
from .kinds import Found, check_causal, check_class_found, check_takes
from .scores import KnownMaximum, UncomputedScores
from .stand_in import batch_of, is_stand_in, recipe_of
from .traced_kernel import TracedKernel, is_causal, operator, tracing
from .under_way import running

NAME = "attention"

_MATMULS = ("matmul", "__matmul__", "__rmatmul__")
_SOFTMAXES = ("softmax",)
"""Names of torch's functions: what torch.compile traces are not the same objects."""


def find(model: nn.Module, patch: Patch) -> Found:
    every = tuple(module for module in model.modules() if patch.is_attention(module))
    check_class_found(patch, model, patch.attention, every)
    for module in every:
        check_causal(module)
    modules = tuple(module for module in every if not uses_interface(module, patch))
    for module in modules:
        check_takes(patch, module, "attention_mask", "position_ids")
    return Found(frozenset(Seam(type(each), "forward", concerns, answer, traced=traced) for each in modules), modules)


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return is_stand_in(kwargs.get("attention_mask")) and OptIn.of(args[0]) is not None


@torch.compiler.disable
def answer(call: Call) -> object:
    """Answers an attention module's forward on a packed batch.

    Not traced by torch.compile: the lengths differ from batch to batch, and each would be compiled anew.

    Raises PadfreeError if upstream's forward never comes to a kernel call that we know.
    """
    module, mask = call.module, call.arguments["attention_mask"]
    opt_in = OptIn.of(module)
    assert opt_in is not None
    given = (value for value in call.arguments.values() if isinstance(value, Tensor) and value is not mask)
    tokens = next(given)  # the hidden states (B, T, D)
    shape = int(tokens.shape[0]), int(tokens.shape[1])
    batch = batch_of(mask, shape, tokens.device, call.arguments.get("position_ids"))
    positions = rotaries.positions_for(module, batch)
    call.arguments |= {"attention_mask": None, "position_ids": positions}
    prepared = _prepare(call, batch, opt_in.model_type)
    kernel = PackedKernel(module, batch.sequences, recipe_of(mask), opt_in.backend, prepared.key_bias)
    with running(batch=batch, kernel=kernel), KernelMode(kernel, positions, batch):
        result = prepared.call.proceed()
    if not kernel.answered:
        raise PadfreeError(
            f"{kernel.owner}.forward came to no attention kernel that padfree_patch knows "
            "(scaled_dot_product_attention, softmax between two matmuls, or flash-attn)"
        )
    if isinstance(result, tuple):  # eager returns its weights; those of a packed batch are never computed
        return tuple(None if isinstance(item, UncomputedScores) else item for item in result)
    return result


def traced(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers while torch.compile traces: with upstream's forward, whose kernel call is one operator of the graph.

    Not where somebody must know the batch: a patch that changes the call, or a rotary that counts tokens itself.
    """
    module, mask = args[0], kwargs["attention_mask"]
    opt_in = OptIn.of(module)
    if operator is None or opt_in is None or not is_causal(module):
        return NotImplemented
    decides = _what_decides_if_calls_change(opt_in.model_type)
    if decides == "" or (decides is not None and getattr(module.config, decides, True)):
        return NotImplemented
    if kwargs.get("position_embeddings") is None and not _rotates_by_positions(getattr(module, "rotary_emb", None)):
        return NotImplemented
    kernel = TracedKernel(module, mask)
    tracing.kernel = kernel
    with KernelMode(kernel):
        result = original(*args, **{**kwargs, "attention_mask": None})
    tracing.kernel = None
    if not kernel.answered:
        return NotImplemented
    if isinstance(result, tuple):
        return tuple(None if isinstance(item, UncomputedScores) else item for item in result)
    return result


@torch.compiler.assume_constant_result
def _what_decides_if_calls_change(model_type: str) -> str | None:
    """Returns `Patch.attention_call_needs` of an architecture; None if its patch changes no call."""
    patch = registry().get(model_type)
    return None if patch is None or patch.attention_call is None else patch.attention_call_needs


def _rotates_by_positions(rotary: nn.Module | None) -> bool:
    """Whether a rotary looks at nothing but the positions that it is given; None for no rotary."""
    return rotary is None or (_takes_positions(type(rotary)) and not rotaries.depends_on_length(rotary))


@torch.compiler.assume_constant_result
def _takes_positions(rotary: type[nn.Module]) -> bool:
    return "position_ids" in signature(original_of(rotary.forward)).parameters


def _prepare(call: Call, batch: PackedBatch, model_type: str) -> AttentionCall:
    prepared = AttentionCall(call, batch)
    patch = registry().get(model_type)
    return prepared if patch is None or patch.attention_call is None else patch.attention_call(prepared)


class KernelMode(TorchFunctionMode):
    """Answers the kernel call inside one forward of one attention module."""

    def __init__(
        self, kernel: PackedKernel | TracedKernel, positions: Tensor | None = None, batch: PackedBatch | None = None
    ):
        super().__init__()
        self._kernel, self._positions, self._batch = kernel, positions, batch

    def __torch_function__(
        self, func: Function, types: object, args: tuple[Any, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self._kernel.attending:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if _name_of(func) in _MATMULS and not kwargs and all(isinstance(x, Tensor) and x.dim() == 4 for x in args):
            q, k_transposed = args
            biased = self._kernel.key_bias is not None
            return UncomputedScores(q, k_transposed.transpose(2, 3), self._kernel.owner, biased)
        if func is Tensor.max and len(args) == 1 and self._asks_last_positions(args[0]):
            return KnownMaximum(self._largest_last_position())
        if any(isinstance(x, UncomputedScores) for x in (*args, *kwargs.values())):
            return self._on_scores(func, args, kwargs)
        return func(*args, **kwargs)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Takes torch's arguments; packed attention is always causal and always takes grouped queries."""
        if attn_mask is not None and attn_mask.numel() > 1:
            owner = self._kernel.owner
            raise PadfreeError(f"{owner} passes a mask of its own to scaled_dot_product_attention: not supported")
        return self._kernel.attend(query, key, value, scale=scale, dropout=dropout_p)

    def _on_scores(self, func: Function, args: tuple[Any, ...], kwargs: Arguments) -> UncomputedScores | Tensor:
        if is_tracing() and _name_of(func) in _MATMULS and len(args) == 2 and isinstance(args[1], UncomputedScores):
            args = args[::-1]  # torch.compile turns `weights @ v` around
        first = args[0] if args else None
        if isinstance(first, UncomputedScores):
            if _name_of(func) in _SOFTMAXES:
                return first.after_softmax()
            if func is F.dropout:
                return first.after_dropout(*args[1:], **kwargs)
            if _name_of(func) in _MATMULS and isinstance(args[1], Tensor):
                return self._kernel.attend(first.q, first.k, args[1], scale=first.scale, dropout=first.dropout)
        name, owner = getattr(func, "__qualname__", repr(func)), self._kernel.owner
        raise PadfreeError(f"{owner} applies {name} to its attention scores, which padfree_patch can't follow")

    def _asks_last_positions(self, asked: Tensor) -> bool:
        """Whether a tensor is `position_ids[:, -1]` of the positions that the module was given, by its memory."""
        ours = self._positions
        if ours is None or self._batch is None or ours is self._batch.position_ids or asked.dim() != 1:
            return False
        if self._batch.steps_by_one is False:
            return False  # the last position is not the last length, and must be read
        last = ours[:, -1]
        return asked.data_ptr() == last.data_ptr() and (asked.shape, asked.stride()) == (last.shape, last.stride())

    def _largest_last_position(self) -> int:
        assert self._batch is not None and self._positions is not None
        if self._positions is not self._batch.positions_from_zero:  # counted over the whole row
            return self._batch.sequences.total - 1
        return max(self._batch.last_lengths) - 1


def _name_of(function: Function) -> str:
    return getattr(function, "__name__", "")
