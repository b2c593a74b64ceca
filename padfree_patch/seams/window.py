"""How a mask builder of upstream masks one sequence, read off a mask of eight tokens that the very builder makes.

The size of a window differs by one token or altogether between versions, implementations and layers. So no table of
versions says it: the builder is asked for a mask with a window of four, and the difference is what it adds.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch.cache import MISSING, LastUsed
from ..errors import PadfreeError
from ..upstream import Arguments
from ..wrapping.call import Call, signature
from .stand_in import CAUSAL, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROBE_TOKENS, _PROBE_WINDOW = 8, 4

measured: LastUsed[int | None] = LastUsed(entries=128)
"""Tokens by which the effective window differs from the configured one, per builder and config; None: no window."""

Build = Callable[..., Tensor | None]


def recipe_of_builder(call: Call) -> Recipe:
    """Returns how a builder would mask one sequence, if it is called like this.

    Raises PadfreeError if that is no causal window.
    """
    arguments = call.arguments
    if "input_shape" in arguments:  # 4.34 on: the window is an argument
        size = arguments.get("sliding_window")
        return _recipe(call.original, size, functools.partial(_probe_function, arguments), size) if size else CAUSAL
    owner = arguments.get("self")  # 4.38 to 4.52: a method, which reads its config
    config = owner.config if owner is not None else arguments["config"]  # 4.53 on: an argument
    size = getattr(config, "sliding_window", None)
    if not size:
        return CAUSAL
    # What in a config decides about windows; the measured size is kept per combination.
    facts = tuple(
        (k, str(v)) for k, v in sorted(vars(config).items()) if "window" in k or "layer_type" in k or "attn" in k
    )
    return _recipe(call.original, size, functools.partial(_probe_with_config, arguments, owner, config), facts)


def recipe_before(builder: Build, owner: PreTrainedModel) -> Recipe:
    """Returns how a builder of a decoder, its method or a function that reads its config, will mask one sequence.

    Raises PadfreeError as `recipe_of_builder`.
    """
    parameters = signature(builder).parameters.values()
    named = (each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    required = [each.name for each in named if each.default is each.empty]
    known = {"self": owner, "config": owner.config}
    return recipe_of_builder(Call(builder, (), {name: known.get(name) for name in required}))


def _recipe(original: Build, size: int, probe: Callable[[Build], Tensor | None], facts: Hashable) -> Recipe:
    key = weakref.ref(original), facts  # a builder of code loaded at run time would keep all of its classes alive
    difference = measured.find(key)
    if difference is MISSING:
        with torch.no_grad(), torch.device("cpu"):
            difference = measured.keep(key, _difference(probe(original), original))
    return CAUSAL if difference is None else Recipe(window=size + difference)


def _probe_function(arguments: Arguments, original: Build) -> Tensor | None:
    embeds = torch.empty(1, _PROBE_TOKENS, 1)
    stand_ins = {
        "self": arguments.get("self"),
        "input_shape": embeds.shape[:2],
        "inputs_embeds": embeds,
        "past_key_values_length": 0,
        "sliding_window": _PROBE_WINDOW,
    }
    return original(**{name: stand_ins.get(name) for name in arguments})


def _probe_with_config(
    arguments: Arguments, owner: PreTrainedModel | None, config: PretrainedConfig, original: Build
) -> Tensor | None:
    small = copy.copy(config)
    small.sliding_window = _PROBE_WINDOW
    embeds = torch.empty(1, _PROBE_TOKENS, 1)
    stand_ins: Arguments = {
        "config": small,
        "input_tensor": embeds,
        "inputs_embeds": embeds,
        "input_embeds": embeds,  # its name until 5.2
        "cache_position": torch.arange(_PROBE_TOKENS),
        "use_cache": False,
        "output_attentions": False,
    }
    given = {name: stand_ins.get(name) for name in arguments if name != "self"}
    if owner is not None:
        decoder = copy.copy(owner)  # shallow: shares the layers, which the builder does not touch
        decoder.config = small
        given["self"] = decoder
    return original(**given)


def _difference(mask: object, original: Build) -> int | None:
    """Returns how many tokens more than `_PROBE_WINDOW` a mask lets a query see; None if it has no window."""
    if mask is None:  # upstream leaves it to is_causal
        return None
    name = f"{original.__module__}.{original.__qualname__}"
    if not isinstance(mask, Tensor):
        raise PadfreeError(f"{name} builds a {type(mask).__name__}: load the model as sdpa or eager")
    keep = (mask if mask.dtype == torch.bool else mask == 0)[0, 0, :, :_PROBE_TOKENS]
    seen = int(keep[:, 0].sum())
    position = torch.arange(_PROBE_TOKENS)
    distance = position[:, None] - position
    if not torch.equal(keep, (distance >= 0) & (distance < seen)):
        raise PadfreeError(f"{name} builds no causal sliding window, but\n{keep.int()}")
    return None if seen == _PROBE_TOKENS else seen - _PROBE_WINDOW
