"""What backends are compared with: attention written out in float64, on random q, k and v."""

from __future__ import annotations

import torch

from padfree_patch.attention import sdpa

LENGTHS = (5, 1, 17, 130, 3)
LONG = (1, 64, 129, 192, 193, 300, 2, 2049)
"""Both sides of every length at which the CPU's own way changes."""


def reference(q, k, v, sequences, *, scale, window=0, softcap=0.0):
    """Computes masked softmax attention, sequence by sequence, in float64: q (T, H, D), k and v (T, K, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    outputs = []
    for q_, k_, v_ in zip(*(x.double().split(list(sequences.lengths)) for x in (q, k, v))):
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        distance = torch.arange(len(q_))[:, None] - torch.arange(len(q_))
        hidden = (distance < 0) | (distance >= (window or len(q_)))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_))
    return torch.cat(outputs)


def random_qkv(heads=6, key_heads=2, head_dim=8, *, lengths=LENGTHS, dtype=torch.float32):
    """Makes leaves q (T, H, D), k and v (T, K, D), the same ones on every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def errors(qkv, sequences, *, attend=sdpa.attend, **options):
    """Measures the output and the three gradients against float64: norm of the error over norm of the right result."""
    output = attend(*qkv, sequences, **options)
    assert output.dtype == qkv[0].dtype
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*exact, sequences, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    found = (output, *torch.autograd.grad(output, qkv, weights))
    wanted = (expected, *torch.autograd.grad(expected, exact, weights.double()))
    return [float((one.double() - other).detach().norm() / other.detach().norm()) for one, other in zip(found, wanted)]
