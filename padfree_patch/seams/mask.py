"""Upstream's mask builders: given a stand-in for the mask, they answer with a stand-in that has their recipe."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..models import pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .kinds import Found, changed, class_named
from .stand_in import find_stand_in, with_recipe
from .window import recipe_of_builder

NAME = "mask"

BUILDER_FUNCTIONS = (
    "_prepare_4d_causal_attention_mask",  # 4.35 on
    "_prepare_4d_causal_attention_mask_for_sdpa",  # 4.36 on
    "create_causal_mask",  # 4.53 on
    "create_sliding_window_causal_mask",  # 4.53 on
)
"""Names that decoders call as globals of their modeling file."""

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
    found = {Seam(owner.__module__, name, concerns, answer) for name in BUILDER_FUNCTIONS if name in namespace}
    found |= {Seam(owner, name, concerns, answer) for name in BUILDER_METHODS if hasattr(owner, name)}
    if not found:
        raise changed(
            patch,
            f"{owner.__module__} has none of {', '.join(BUILDER_FUNCTIONS)} and {owner.__name__} none of "
            f"{', '.join(BUILDER_METHODS)}, one of which must build the attention mask",
        )
    return found


def concerns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return find_stand_in((*args, *kwargs.values())) is not None


@torch.compiler.disable
def answer(call: Call) -> Tensor:
    given = find_stand_in(call.arguments.values())
    assert given is not None
    return with_recipe(given, recipe_of_builder(call))
