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
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from .readings import without_weights

_TOKENS, _HEAD_SIZE, _SCALE = 6, 4, 0.5
_SIZES_OF_SCORES = (0.0, 100.0)
"""What is added to all scores: a softcap shows in large ones only, a sink beside small ones only."""


def sinks_in(arguments: Arguments) -> Tensor | None:
    """Returns the sinks among the arguments of an attention function, or None."""
    return next((arguments[each] for each in SINKS if arguments.get(each) is not None), None)


def takes_sinks(call: Call) -> bool:
    """Whether an eager attention function, which is told what sinks there are, computes softmax attention with them.

    transformers' sdpa, and eager functions that never heard of them, ignore sinks. Asked once for each module.
    """
    given = call.with_defaults()
    module, name = given[call.names[0]], next((name for name in SINKS if name in given), None)
    opt_in = OptIn.of(module)
    if name is None or opt_in is None or "eager" not in call.original.__name__:
        return False
    if opt_in.takes_sinks is None:
        opt_in.takes_sinks = _computes_softmax(call, module, name, given[name])
    return opt_in.takes_sinks


def _computes_softmax(call: Call, module: nn.Module, name: str, sinks: Tensor | None) -> bool:
    """Whether a function computes softmax attention, with the sinks of a module that it is given under a name."""
    heads, key_heads = (call.arguments[each].shape[1] for each in call.names[1:3])
    own = next((each for each, parameter in module.named_parameters(recurse=False) if parameter is sinks), None)
    if sinks is not None and (own is None or sinks.shape != (heads,)):
        return False
    husk = without_weights(module).eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            made_up = None if sinks is None else torch.linspace(-1, 1, heads, dtype=torch.float32)
            if own is not None and made_up is not None:  # a function may read them of the module itself
                husk.register_parameter(own, nn.Parameter(made_up))
            return all(
                torch.allclose(_called(call, husk, {name: made_up}, *qkv, mask), expected, atol=1e-4)
                for *qkv, mask, expected in _examples(heads, key_heads, made_up)
            )
    except Exception:  # upstream's own: it wants something else of its module
        return False


def _called(call: Call, module: nn.Module, given: dict[str, Tensor | None], *tensors: Tensor) -> Tensor:
    output: Tensor = call.original(module, *tensors, scaling=_SCALE, dropout=0.0, **given)[0]
    return output


def _examples(heads: int, key_heads: int, sinks: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Yields q (1, H, T, D), k and v (1, K, T, D), a mask to add, and what attention is then, (1, T, H, D)."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape, dtype = (_TOKENS, _HEAD_SIZE), torch.float32
    mask = torch.full((_TOKENS, _TOKENS), -torch.inf, dtype=dtype).triu(1)
    for size in _SIZES_OF_SCORES:
        q, k, v = (torch.randn(1, n, *shape, generator=generator, dtype=dtype) for n in (heads, key_heads, key_heads))
        q[..., 0], k[..., 0] = 1.0, k[..., 0] + size / _SCALE
        grouped = q.unflatten(1, (key_heads, -1)).flatten(2, 3)  # (1, K, G * T, D)
        scores = _SCALE * grouped @ k.transpose(2, 3) + mask.repeat(heads // key_heads, 1)
        weights, _ = softmax_with_sinks(scores, sinks)
        yield q, k, v, mask[None, None], (weights @ v).reshape(1, heads, *shape).transpose(1, 2)
