"""Upstream's own attention forward, with only its kernel call answered by a varlen backend.

Projections, rotary, norms, clipping and the output projection stay upstream's, whatever the version. A torch-function
mode around the one call sees the torch functions that it uses, and answers two of them: `scaled_dot_product_attention`,
and the `matmul(q, k.T) ... softmax ... matmul(weights, v)` of eager attention, whose T x T scores are never computed:
`_Scores` stands in for them and notes what upstream does to them. Other threads and other models see nothing, and a
function that is not understood is an error that names it.

Models loaded as flash_attention_2 come to no torch function but to flash-attn's, or to upstream's function around it.
Those are wrapped where upstream looks them up (`padfree_patch.seams`) and ask whether a packed call is under way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import attention, rope, versions
from .boundaries import batch_at_layer
from .errors import PadfreeError
from .masks import window_of
from .packing import PackedSequences
from .registry import AttentionCall, registry

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


@torch.compiler.disable
def packed_attention(
    original: Callable[..., Any], model_type: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls an attention module's forward on a packed batch.

    Not traced by torch.compile: the lengths differ from batch to batch, and each would be compiled anew.

    Args:
        original: the forward; its `args` begin with the module, its `kwargs` hold position_ids and a packed mask.
        model_type: whose patch it is.
        backend: its name, or "auto".

    Raises PadfreeError if no position_ids arrive or upstream's forward never comes to a kernel call that we know.
    """
    module: nn.Module = args[0]
    batch = batch_at_layer(kwargs.get("position_ids"))
    changed = {**kwargs, "attention_mask": None, "position_ids": rope.positions_for(module, batch)}
    call = AttentionCall(module, batch, original, changed)
    patch = registry().get(model_type)
    key_bias = patch.attention_call(call) if patch is not None and patch.attention_call is not None else None
    kernel = _KernelCall(module, batch.sequences, window_of(kwargs["attention_mask"]), backend, key_bias)
    with rope.rotating(batch), kernel:
        result = call.forward(*args, **call.arguments)
    if not kernel.answered:
        raise PadfreeError(
            f"{type(module).__name__}.forward came to no attention kernel that padfree_patch knows "
            "(scaled_dot_product_attention, softmax between two matmuls, or flash-attn)"
        )
    if isinstance(result, tuple):  # eager returns its weights; those of a packed batch are never computed
        return tuple(None if isinstance(item, _Scores) else item for item in result)
    return result


def flash_attention_forward(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers upstream's function `_flash_attention_forward` (4.43 on), whose tensors are (B, T, heads, D)."""
    call: _KernelCall | None = getattr(_current, "call", None)
    if call is None:
        return original(*args, **kwargs)
    given = _bound(original, args, kwargs)
    q, k, v = given["query_states"], given["key_states"], given["value_states"]
    target = given.get("target_dtype")  # that of the weights, if norms were cast up
    if target is not None and q.dtype == torch.float32:
        q, k, v = (x.to(target) for x in (q, k, v))
    size = given["sliding_window"]
    return call.flash_attention(
        q,
        k,
        v,
        scale=given["softmax_scale"],
        dropout=given["dropout"],
        softcap=given["softcap"],
        window=size + _flash_window_surplus() if size else 0,
        causal=given["is_causal"] and given.get("kwargs", {}).get("s_aux") is None,  # an attention sink
    )


def flash_attn_func(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers flash-attn's own function where attention classes call it (until 4.42)."""
    call: _KernelCall | None = getattr(_current, "call", None)
    if call is None:
        return original(*args, **kwargs)
    given = _bound(original, args, kwargs)
    left, _ = given.get("window_size", (-1, -1))  # how many tokens a query sees beside itself; -1: all
    return call.flash_attention(
        given["q"],
        given["k"],
        given["v"],
        scale=given["softmax_scale"],
        dropout=given["dropout_p"],
        softcap=given.get("softcap"),
        window=left + 1,
        causal=given["causal"],
    )


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


_current = threading.local()
"""`call`: the packed call that runs in this thread; `windows`: the list that `recording_windows` gave."""


@contextmanager
def recording_windows() -> Iterator[list[int]]:
    """A list of the windows that kernels are called with from here on, in this thread: tokens seen, 0 for all."""
    windows: list[int] = []
    _current.windows = windows
    try:
        yield windows
    finally:
        _current.windows = None


class _KernelCall(TorchFunctionMode):
    """Answers the attention kernel inside one forward of one module."""

    def __init__(
        self, module: nn.Module, sequences: PackedSequences, window: int, backend: str, key_bias: Tensor | None
    ):
        super().__init__()
        self.answered = False
        self._answering = False
        self._owner = type(module).__name__
        self._sequences, self._window, self._backend, self._key_bias = sequences, window, backend, key_bias

    def __enter__(self) -> Any:
        _current.call = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _current.call = None
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._answering:  # what the backend itself calls, if it was not this method that called the backend
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func in _MATMULS and not kwargs and all(isinstance(x, Tensor) and x.dim() == 4 for x in args):
            q, k_transposed = args
            return _Scores(q, k_transposed.transpose(2, 3), biased=self._key_bias is not None)
        if func is Tensor.max and len(args) == 1 and args[0].dtype == torch.int64 and args[0].dim() == 1:
            return _Maximum(self._sequences.max_seqlen - 1)
        if any(isinstance(x, _Scores) for x in args) or any(isinstance(x, _Scores) for x in kwargs.values()):
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
        """torch's signature; `is_causal` and `enable_gqa` say nothing new: packed attention always is, always can."""
        if attn_mask is not None and attn_mask.numel() > 1:
            raise PadfreeError(f"{self._owner} passes a mask of its own to scaled_dot_product_attention: not supported")
        return self._attend(query, key, value, scale or query.shape[-1] ** -0.5, dropout_p)

    def flash_attention(
        self,
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
        """q (B, T, H, D), k and v (B, T, K, D); returns (B, T, H, D)."""
        if not causal:
            raise PadfreeError(f"{self._owner} asks flash-attn for attention that is not plainly causal: not supported")
        self._answering = True
        try:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            output = self._attend(q, k, v, scale, float(dropout), window=window, softcap=softcap or 0.0)
            return output.transpose(1, 2)
        finally:
            self._answering = False

    def _on_scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if isinstance(first, _Scores):
            if func in _SOFTMAXES:
                return first.after_softmax()
            if func is F.dropout:
                return first.after_dropout(*args[1:], **kwargs)
            if func in _MATMULS and isinstance(args[1], Tensor):
                return self._attend(first.q, first.k, args[1], first.scale, first.dropout)
        name = getattr(func, "__qualname__", repr(func))
        raise PadfreeError(f"{self._owner} applies {name} to its attention scores, which padfree_patch can't follow")

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dropout: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, K, T, D); returns (B, H, T, D). window: if not that of the mask."""
        window = self._window if window is None else window
        if (windows := getattr(_current, "windows", None)) is not None:
            windows.append(window)
        if not (q.shape[2] == k.shape[2] and q.shape[0] * q.shape[2] == self._sequences.total):
            raise PadfreeError(
                f"{self._owner}: {self._sequences} meet {q.shape[2]} queries and {k.shape[2]} keys in {q.shape[0]} rows"
            )
        self.answered = True
        head_dim = q.shape[3]
        if self._key_bias is not None:
            q, k, v = _with_key_bias(q, k, v, self._key_bias)
        dtype = _autocast_dtype(q.device.type) or q.dtype
        needs = attention.Needs(q.device.type, dtype, q.shape[3], window=window, softcap=softcap, dropout=dropout)
        rows = q.shape[0]
        q, k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
        backend = attention.select(needs, self._backend)
        output: Tensor = backend.attend(
            q, k, v, self._sequences, scale=scale, window=window, softcap=softcap, dropout=dropout
        )
        return output[..., :head_dim].unflatten(0, (rows, -1)).transpose(1, 2)


def _with_key_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with one more channel, in which q @ k.T adds a bias (H, B * T) to the scores of each key.

    So every backend can do it, without a mask. Eight channels, because fast kernels want a multiple of that.
    """
    if k.shape[1] != q.shape[1]:  # the bias differs between the heads that would share a key
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    of_keys = bias.view(bias.shape[0], q.shape[0], -1, 1).transpose(0, 1).to(k.dtype)  # (B, H, T, 1)
    q = F.pad(torch.cat([q, torch.ones_like(of_keys)], dim=3), (0, 7))
    k = F.pad(torch.cat([k, of_keys], dim=3), (0, 7))
    return q, k, F.pad(v, (0, 8))


def _flash_window_surplus() -> int:
    """Tokens that upstream's window for flash-attn has beside the configured ones: it was (w, w) before 4.56."""
    return 0 if versions.inside(versions.transformers_version(), ">=4.56") else 1


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast would compute the kernel in; a kernel from outside torch does not see autocast itself."""
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except (AttributeError, TypeError):  # before torch 2.4
        return torch.get_autocast_gpu_dtype() if device_type == "cuda" and torch.is_autocast_enabled() else None


class _Maximum(int):
    """What classes for flash-attn before 4.48 ask in every layer, `position_ids[:, -1].max().item()`, without a sync.

    They make rotary tables of that many rows, or of as many as there are tokens, whichever is more.
    """

    def item(self) -> int:
        return int(self)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scores:
    """Stands in for the attention scores (B, H, T, T) of an eager forward, which scales, softmaxes and drops them."""

    q: Tensor
    k: Tensor
    biased: bool
    """Whether the patch has a bias on keys, which upstream then may add."""
    scale: float = 1.0
    dropout: float = 0.0
    softmaxed: bool = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:3], self.k.shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __mul__(self, factor: float) -> _Scores:
        if self.softmaxed or isinstance(factor, (Tensor, _Scores)):
            raise PadfreeError("attention scores are multiplied by something other than a number before the softmax")
        return dataclasses.replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def __add__(self, other: Tensor | None) -> _Scores:
        """Upstream adds its mask, of which a packed batch has none or one element; or the bias that the patch knows.

        That one `_with_key_bias` sees to.
        """
        bias_on_keys = self.biased and isinstance(other, Tensor) and other.shape[-2] == 1
        if other is not None and other.numel() > 1 and not bias_on_keys:
            raise PadfreeError("something that is no mask is added to the attention scores of a packed batch")
        return self

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]  # which the mode above answers

    def __truediv__(self, divisor: float) -> _Scores:
        return self * (1.0 / divisor if not isinstance(divisor, Tensor) else divisor)

    def to(self, *_: Any, **__: Any) -> _Scores:
        """Casts and views mean nothing here: the backend works in the dtype of q, with the softmax in float32."""
        return self

    type_as = float = view = to

    def after_softmax(self) -> _Scores:
        return dataclasses.replace(self, softmaxed=True)

    def after_dropout(self, p: Any = 0.5, training: bool = True, inplace: bool = False) -> _Scores:
        assert self.softmaxed
        return dataclasses.replace(self, dropout=float(p) if training else 0.0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Makes torch functions accept a stand-in; while one exists the mode above is active and comes first.
        raise PadfreeError(f"attention scores of a packed batch left their forward ({func})")
