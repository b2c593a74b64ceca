"""Sinks: eager attention functions whose softmax has one more logit for each head, told by what they compute.

Upstream writes such a function in several ways. Each is called once, on a few made-up tokens, and its result compared
with attention written out. Whether it caps or clamps scores, only large ones show, so it is called on such too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..attention.sinks import softmax_with_sinks
from ..seams.interface import SINKS
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from .readings import without_weights

_TOKENS, _HEAD_SIZE, _SCALE = 6, 4, 0.5
_SIZES_OF_SCORES = (0.0, 100.0)
"""What is added to all scores: a softcap shows in large ones only, a sink beside small ones only."""


def sinks_of(call: Call) -> Tensor | None:
    """Returns the sinks (H,) that an eager attention function is given, if it computes what they stand for.

    None if it is given none, or if nobody knows what it makes of them: sdpa's of transformers ignores them.
    """
    given = call.with_defaults()
    module, name = given[call.names[0]], next((name for name in SINKS if given.get(name) is not None), None)
    opt_in = OptIn.of(module)
    if name is None or opt_in is None or "eager" not in call.original.__name__:
        return None
    sinks = given[name]
    if opt_in.knows_sinks is None:
        opt_in.knows_sinks = _computes_sinks(call, module, name, sinks)
    return sinks if opt_in.knows_sinks else None


def _computes_sinks(call: Call, module: nn.Module, name: str, sinks: Tensor) -> bool:
    """Whether a function computes softmax attention with the sinks of a module that it is given under a name."""
    own = next((each for each, parameter in module.named_parameters(recurse=False) if parameter is sinks), None)
    heads, key_heads = (call.arguments[each].shape[1] for each in call.names[1:3])
    if own is None or sinks.shape != (heads,):
        return False
    husk = without_weights(module).eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            made_up = torch.linspace(-1, 1, heads)
            husk.register_parameter(own, nn.Parameter(made_up))  # which a function may read of the module itself
            return all(
                torch.allclose(_called(call, husk, {name: made_up}, *qkv, mask), expected, atol=1e-4)
                for *qkv, mask, expected in _examples(made_up, key_heads)
            )
    except Exception:  # upstream's own: it wants something else of its module
        return False


def _called(call: Call, module: nn.Module, given: dict[str, Tensor], *tensors: Tensor) -> Tensor:
    output: Tensor = call.original(module, *tensors, scaling=_SCALE, dropout=0.0, **given)[0]
    return output


def _examples(sinks: Tensor, key_heads: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields q (1, H, T, D), k and v (1, K, T, D), a mask to add, and what attention is then, (1, T, H, D)."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (_TOKENS, _HEAD_SIZE)
    mask = torch.full((_TOKENS, _TOKENS), -torch.inf).triu(1)
    for size in _SIZES_OF_SCORES:
        q, k, v = (torch.randn(1, n, *shape, generator=generator) for n in (len(sinks), key_heads, key_heads))
        q[..., 0], k[..., 0] = 1.0, k[..., 0] + size / _SCALE
        grouped = q.unflatten(1, (key_heads, -1)).flatten(2, 3)  # (1, K, G * T, D)
        scores = _SCALE * grouped @ k.transpose(2, 3) + mask.repeat(len(sinks) // key_heads, 1)
        weights, _ = softmax_with_sinks(scores, sinks)
        yield q, k, v, mask[None, None], (weights @ v).reshape(1, len(sinks), *shape).transpose(1, 2)
