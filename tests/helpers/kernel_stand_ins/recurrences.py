"""What causal_conv1d, mamba_ssm and fla compute, token by token, on the CPU: their kernels want CUDA.

Written from the recurrences, with their functions' names and arguments, so that transformers takes them for the
packages. Each sequence begins anew where `seq_idx` or `cu_seqlens` say so, as in the packages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

deaf: set[str] = set()
"""Names of functions that do not listen to what they are told; for tests."""
calls: list[str] = []
"""Names of the functions that were called."""


def lengths_of(name: str, seq_idx: Tensor | None, cu_seqlens: Tensor | None, tokens: int) -> list[int]:
    """Returns the tokens of each sequence of a row."""
    calls.append(name)
    if name in deaf:
        return [tokens]
    if seq_idx is not None:
        assert seq_idx.shape == (1, tokens) and seq_idx.dtype == torch.int32
        return seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
    return [tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()


def on_each(run: Callable[..., Tensor], lengths: list[int], dim: int, *values: Tensor) -> Tensor:
    """Runs a recurrence on each sequence of tensors whose tokens lie in one dimension."""
    parts = zip(*(each.split(lengths, dim) for each in values))
    return torch.cat([run(*part) for part in parts], dim)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """x (B, D, T), weight (D, width)."""

    def run(x: Tensor) -> Tensor:
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))
        return F.silu(out) if activation in ("silu", "swish") else out

    return on_each(run, lengths_of("causal_conv1d_fn", seq_idx, None, x.shape[-1]), -1, x)


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):
    """q, k (B, T, H, K), v (B, T, HV, V), g and beta (B, T, HV)."""
    if use_qk_l2norm_in_kernel:
        q, k = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (q, k))
    groups = v.shape[2] // k.shape[2]
    q, k = (each.repeat_interleave(groups, dim=2) for each in (q, k))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    last: list[Tensor] = []

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        state, outputs = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=v.dtype), []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            new = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * scale))
        last.append(state)
        return torch.stack(outputs, dim=1)

    out = on_each(run, lengths_of("chunk_gated_delta_rule", None, cu_seqlens, q.shape[1]), 1, q, k, v, g, beta)
    return out, last[-1] if output_final_state else None


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    """x (B, T, H, P), dt (B, T, H), A (H,), B and C (B, T, G, N)."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    groups = x.shape[2] // B.shape[2]
    B, C = (each.repeat_interleave(groups, dim=2) for each in (B, C))

    last: list[Tensor] = []

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state, outputs = torch.zeros(*x[:, 0].shape, B.shape[-1], dtype=x.dtype), []
        for t in range(x.shape[1]):
            added = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
            state = state * (dt[:, t] * A).exp()[..., None, None] + added
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
        last.append(state)
        return torch.stack(outputs, dim=1)

    out = on_each(run, lengths_of("mamba_chunk_scan_combined", seq_idx, None, x.shape[1]), 1, x, dt, B, C)
    out = out if D is None else out + D[:, None] * x
    return (out, last[-1]) if return_final_states else out


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """All of a Mamba 2 mixer from zxbcdt (B, T, ...) on: what training calls in place of the two others."""
    seq_idx = None if "mamba_split_conv1d_scan_combined" in deaf else seq_idx
    heads, inner, width = len(dt_bias), len(dt_bias) * headdim, zxbcdt.shape[-1]
    states = (width - 2 * inner - heads) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * states, heads], dim=-1)
    xbc = causal_conv1d_fn(xbc.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, b, c = xbc.split([inner, states, states], dim=-1)
    x, b, c = x.unflatten(-1, (heads, headdim)), b.unflatten(-1, (ngroups, -1)), c.unflatten(-1, (ngroups, -1))
    options = {"dt_bias": dt_bias, "seq_idx": seq_idx, "dt_softplus": True, "dt_limit": dt_limit}
    out = mamba_chunk_scan_combined(x, dt, A, b, c, chunk_size, D, **options).flatten(2)
    if rmsnorm_weight is not None:
        gated = out if norm_before_gate else out * F.silu(z)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + rmsnorm_eps) * rmsnorm_weight
        out = normed * F.silu(z) if norm_before_gate else normed
    else:
        out = out * F.silu(z)
    return F.linear(out, outproj_weight, outproj_bias)
