"""Derivatives of derivatives: gradients that have gradients themselves, and the error where a kernel has none.

Kernels have a backward, and no backward of that. A backward that autograd can't see gives second derivatives without
the attention's part, and nothing says so.

`torch.autograd.grad(..., create_graph=True)` and `backward(create_graph=True)` run the backward with gradients enabled;
`torch.func` and forward-mode AD show in the tensors. So whoever is about to take a second derivative can be seen.

Letters: T tokens of all sequences, L of one, H query heads, K key/value heads, D head size. dx is the gradient of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from .per_sequence import working_dtype
from .prompts import seen_keys, split_with_seen_keys
from .sinks import softmax_with_sinks


def transformed(*tensors: Tensor | None) -> bool:
    """Whether `torch.func`, a vmap or forward-mode AD is at work, which follow torch's own operations only.

    The two private functions are what `torch.autograd.Function` and torch's own printing ask. Without them, torch says
    itself that it can't follow our autograd node.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    # Of `is_grads_batched=True`, and so of `torch.autograd.functional.hessian(vectorize=True)`.
    batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)
    given = [x for x in tensors if x is not None]
    return bool(active()) or any(batched(x) or forward_ad.unpack_dual(x).tangent is not None for x in given)


def gradients_with_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    sequences: PackedSequences,
    *,
    scale: float,
    window: int,
) -> tuple[Tensor | None, ...]:
    """Computes dq (T, H, D), dk and dv (T, K, D), and dsinks (H,), by operations that autograd and `torch.func` follow.

    The scores of one sequence are in memory at once, and all of them while the graph lives: as with eager attention.
    """
    with torch.autocast(q.device.type, enabled=False):  # of the caller, whose forward computed in float32 too
        pieces = split_with_seen_keys(sequences, (dout, q), (k, v))
        each = (_of_one_sequence(*tensors, sinks=sinks, scale=scale, window=window) for tensors in pieces)
        *joined, of_sinks = zip(*each)
        dq, dk, dv = (torch.cat(parts, dim=2).squeeze(0).transpose(0, 1) for parts in joined)
        dsinks = None if sinks is None else torch.stack(of_sinks).sum(0).to(sinks.dtype)
        keys = seen_keys(sequences)
        return dq, keys.add_up(dk, sequences.total), keys.add_up(dv, sequences.total), dsinks


def _of_one_sequence(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes dq, dk, dv and dsinks of one sequence.

    dout and q are (1, H, L, D), k and v (1, K, S, D), L the last of S tokens; dsinks (H,) is zero without sinks.
    """
    (heads, length), (key_heads, seen, head_dim), dtype = q.shape[1:3], k.shape[1:], q.dtype
    grouped = (1, key_heads, -1, head_dim)  # (1, K, G * L, D), with G = H / K; a legacy vmap knows no unflatten
    dout, q, k, v = (x.to(working_dtype(dtype)).reshape(grouped) for x in (dout, q, k, v))
    position = torch.arange(seen, device=q.device)
    distance = position[seen - length :, None] - position
    hidden = (distance < 0) | (distance >= (window or seen))  # (L, S)
    scores = scale * q @ k.transpose(2, 3)
    scores = scores.masked_fill(hidden.repeat(q.shape[2] // length, 1), -torch.inf)
    weights, of_sinks = softmax_with_sinks(scores, sinks)
    dweights = dout @ v.transpose(2, 3)
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    dsinks = -(of_sinks * delta).reshape(heads, -1).sum(-1)
    dq = (scale * dscores @ k).reshape(1, -1, length, head_dim)
    dk, dv = scale * dscores.transpose(2, 3) @ q, weights.transpose(2, 3) @ dout
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def refuse_second_derivatives(output: Tensor, backend: str) -> Tensor:
    """Makes the backward of a kernel's output an error where somebody is about to differentiate it again."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise PadfreeError(
                f"backend {backend!r} has no second derivatives (create_graph=True); apply with backend='sdpa', and on "
                "a GPU run the model inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )

    if output.requires_grad:
        output.register_hook(refuse)
    return output
