"""The attention of a packed batch as one operator, which torch.compile takes into its graph as it is.

The boundaries are an argument, a tensor whose values are read inside, so that one graph serves every batch. Dtypes are
settled before: autocast is off inside, as it is in what torch.compile makes.

Letters: B rows, T tokens in a row, H query heads, K key/value heads, D head size. dx is the gradient of x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch.packed_batch import batch_at_layer
from ..errors import PadfreeError
from .kernel import PackedKernel
from .stand_in import Recipe

_OPTIONS = "Tensor boundaries, Tensor? seed, SymInt window, float scale, float softcap, float dropout, str backend"
_SCHEMA = f"Tensor q, Tensor k, Tensor v, {_OPTIONS}"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    seed: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    dropout: float,
    backend: str,
) -> Tensor:
    """Computes (B, T, H, D), in the dtype of v, of q (B, H, T, D), k and v (B, K, T, D).

    Args:
        q, k, v: as upstream has made them.
        boundaries: those of the batch, as the stand-in for its mask carries them.
        seed: int64 (), of what dropout draws: the backward draws the same.
        window: newest tokens that a query sees, itself included; 0 for all.
        scale, softcap, dropout: as `PackedKernel.attend` takes them.
        backend: name of one, or "auto".
    """
    batch = batch_at_layer(boundaries, (q.shape[0], q.shape[2]), q.device)
    kernel = PackedKernel(None, batch.sequences, Recipe(window), backend)
    with torch.autocast(q.device.type, enabled=False), _drawing(seed, q.device):
        out = kernel.attend(q, k, v, scale=scale, dropout=dropout, softcap=softcap)
    return out.transpose(1, 2).contiguous()


def _gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dq, dk and dv, by the backend's own backward of a forward that is computed again."""
    seed = options[1]
    with (
        _autograd_inside(),
        torch.enable_grad(),
        torch.autocast(q.device.type, enabled=False),
        _drawing(seed, q.device),
    ):
        q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = _attend(q, k, v, *options)
        dq, dk, dv = (x.contiguous() for x in torch.autograd.grad(out, leaves, dout))
    return dq, dk, dv


@contextmanager
def _drawing(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Lets random numbers be those of a seed, and those after them what they would have been.

    Raises PadfreeError on a device whose generator is not known: its backward would draw others.
    """
    if seed is None:
        yield
        return
    generator = _generator_of(device)
    before = generator.get_state()
    generator.manual_seed(int(seed))
    try:
        yield
    finally:
        generator.set_state(before)


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    if device.type != "cpu":
        raise PadfreeError(
            f"attention dropout of packed examples under torch.compile is known on cpu and cuda, found {device.type}; "
            "set it to 0, or do not compile"
        )
    return torch.default_generator


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Lets autograd see what an operator does, which runs below it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD):
        yield


def _keys_of_autograd() -> torch._C.DispatchKeySet:
    """Returns the dispatch keys that autograd takes away before it calls what lies below it."""
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_tls_local_exclude_set() - before


_AUTOGRAD = _keys_of_autograd()


attend = torch.library.custom_op("padfree_patch::attend", _attend, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
_attend_backward = torch.library.custom_op(
    "padfree_patch::attend_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor dout, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


@attend.register_fake
def _shape_of_output(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@_attend_backward.register_fake
def _shapes_of_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _attend_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *[None] * 7


attend.register_autograd(_backward, setup_context=_save)
