"""PyTorch's private flash operators for the CPU. `padfree_patch.attention.cpu.works` tries them."""

from __future__ import annotations

import torch
from torch import Tensor


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Calls PyTorch's private operator: q (1, H, L, D) to (1, H, L, D) and the log-sum-exp (1, H, L) of the scores."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = operator(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the private operator's backward, which gives dq, dk and dv."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dq, dk, dv = operator(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk, dv
