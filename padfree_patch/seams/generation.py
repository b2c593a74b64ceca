"""transformers' own decoding loops: whatever they call the model with, nothing is packed.

Positions of padded prompts restart in them in ways that depend on the version, and from 4.45 on they make the masks of
static caches themselves. So what runs inside `generate` is upstream's, without a look at values.
"""

from __future__ import annotations

from torch import nn

from ..errors import PadfreeError
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam
from .kinds import Found
from .under_way import generating

NAME = "generation"

LOOPS = (
    "generate",
    "greedy_search",  # this and the others could be called without generate before 4.41
    "sample",
    "beam_search",
    "beam_sample",
    "group_beam_search",
    "constrained_beam_search",
    "contrastive_search",
    "assisted_decoding",
)


def find(model: nn.Module, patch: Patch | None = None) -> Found:
    """Finds the loops on the class that all models have them from: a model around a patched one generates too."""
    from transformers import GenerationMixin

    return Found(
        frozenset(Seam(GenerationMixin, name, concerns, answer) for name in LOOPS if name in vars(GenerationMixin))
    )


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return isinstance(args[0], nn.Module) and any(OptIn.of(module) is not None for module in args[0].modules())


def answer(call: Call) -> object:
    if call.arguments.get("packed_sequences") is not None:
        raise PadfreeError(
            f"{type(call.module).__name__}.{call.original.__name__} got packed_sequences: a packed row can't be gone "
            "on with, because only its last example ends where new tokens come; give each prompt a row of its own"
        )
    with generating(call.module):
        return call.proceed()
