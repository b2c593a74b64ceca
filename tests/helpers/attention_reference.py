"""What backends are compared with: attention written out in float64, on random q, k and v."""

from __future__ import annotations

import torch

from padfree_patch.attention import sdpa

LENGTHS = (5, 1, 17, 130, 3)
LONG = (1, 64, 129, 192, 193, 300, 2, 2049)
"""Both sides of every length at which the CPU's own way changes."""

SHARED = {"lengths": (7, 3, 5, 1, 200, 2, 150, 64), "prefixes": (-1, 0, 0, -1, -1, 4, 4, 0)}
"""Sequences that go on from two prompts, on both sides of the lengths at which chunks change, and one that does not."""


def reference(q, k, v, sequences, *, scale, window=0, softcap=0.0, sinks=None, key_bias=None):
    """Computes masked softmax attention, sequence by sequence, in float64: q (T, H, D), k and v (T, K, D).

    A sequence that goes on from a shared prompt has the prompt's keys and values before its own.
    sinks: (H,); key_bias: (H, T).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    outputs = []
    queries, keys, values = (x.double().split(list(sequences.lengths)) for x in (q, k, v))
    for i, q_ in enumerate(queries):
        seen = [i] if sequences.prefixes is None or sequences.prefixes[i] < 0 else [sequences.prefixes[i], i]
        k_, v_ = (torch.cat([each[one] for one in seen]) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q_, k_)
        if key_bias is not None:
            of_keys = key_bias.double().split(list(sequences.lengths), dim=1)
            scores = scores + torch.cat([of_keys[one] for one in seen], dim=1)[:, None]
        scores = scores * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        distance = torch.arange(len(k_))[len(k_) - len(q_) :, None] - torch.arange(len(k_))
        hidden = (distance < 0) | (distance >= (window or len(k_)))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:  # a key more, whose value is zero
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q_), 1)], dim=2)
            v_ = torch.cat([v_, torch.zeros_like(v_[:1])])
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
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
