"""Upstream's mask builders: given a stand-in for the mask, they answer with a stand-in that has their recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import versions
from ..models import pretrained_modules
from ..registry import Patch
from ..upstream import Arguments, Function
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from .kinds import Found, changed, class_named
from .stand_in import CAUSAL, Measured, as_measured, find_stand_in, with_recipe
from .window import recipe_before, recipe_of_builder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "mask"

BUILDER_FUNCTIONS = (
    "_prepare_4d_causal_attention_mask",  # 4.35 on
    "_prepare_4d_causal_attention_mask_for_sdpa",  # 4.36 on
    "create_causal_mask",  # 4.53 on
    "create_sliding_window_causal_mask",  # 4.53 on
)
"""Names that decoders call as globals of their modeling file."""

_TAKE_WINDOWS = BUILDER_FUNCTIONS[:2]
"""Those whose window is an argument, which only their call says."""

BUILDER_METHODS = (
    "_prepare_decoder_attention_mask",  # 4.34
    "_prepare_attn_mask",  # 4.34, Falcon
    "_update_causal_mask",  # 4.38 to 4.52
)
"""Methods of the decoder that do the same."""


def find(model: nn.Module, patch: Patch) -> Found:
    seams: set[Seam] = set()
    for decoder in pretrained_modules(model):
        if patch.is_decoder(decoder):
            seams |= _builders(patch, decoder)
    return Found(frozenset(seams))


def _builders(patch: Patch, decoder: nn.Module) -> set[Seam]:
    owner = class_named(decoder, patch.decoder)
    namespace = vars(sys.modules[owner.__module__])
    places: list[tuple[type | str, str]] = [(owner.__module__, name) for name in BUILDER_FUNCTIONS if name in namespace]
    places += [(owner, name) for name in BUILDER_METHODS if hasattr(owner, name)]
    found = {Seam(*each, concerns, answer, traced=None if each[1] in _TAKE_WINDOWS else traced) for each in places}
    if not found:
        raise changed(
            patch,
            f"{owner.__module__} has none of {', '.join(BUILDER_FUNCTIONS)} and {owner.__name__} none of "
            f"{', '.join(BUILDER_METHODS)}, one of which must build the attention mask",
        )
    return found


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return find_stand_in((*args, *kwargs.values())) is not None


@torch.compiler.disable
def answer(call: Call) -> Tensor:
    given = find_stand_in(call.arguments.values())
    assert given is not None
    return with_recipe(given, recipe_of_builder(call))


def traced(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers while torch.compile traces: with what was measured before the call that it traces."""
    given = find_stand_in((*args, *kwargs.values()))
    assert given is not None
    answered = as_measured(given, sliding="sliding" in original.__name__)
    return NotImplemented if answered is None else answered


def measure(decoder: PreTrainedModel) -> Measured | None:
    """Returns the recipes of a decoder's builders, each from its own answer; None if only their calls say them.

    So it is before 4.48, where attention classes compute their kernels themselves, and are not traced.

    Raises PadfreeError if one builds no causal window.
    """
    opt_in = OptIn.of(decoder) if versions.transformers(">=4.48") else None
    builders = [seam for seam in (opt_in.seams if opt_in is not None else ()) if _is_of(seam, decoder)]
    recipes = {"sliding" in seam.name: recipe_before(_builder(seam), decoder) for seam in builders}
    return Measured(recipes.get(False, CAUSAL), recipes.get(True, CAUSAL)) if recipes else None


def _is_of(seam: Seam, decoder: nn.Module) -> bool:
    """Whether a seam is a builder of a decoder, and one whose recipe can be measured before it is called."""
    if seam.traced is not traced:
        return False
    return isinstance(decoder, seam.owner) if isinstance(seam.owner, type) else True


def _builder(seam: Seam) -> Callable[..., Tensor | None]:
    holder = sys.modules[seam.owner] if isinstance(seam.owner, str) else seam.owner
    builder: Callable[..., Tensor | None] = original_of(getattr(holder, seam.name))
    return builder
