"""Upstream's mask builders, wherever a model's classes find them: given a stand-in, they answer with another.

Its recipe calls the very builder for a sequence of a given length. How a mask of eight tokens looks says whether a
varlen kernel can do it; if it can't, the recipe still makes what upstream would.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PadfreeError
from ..seams.kinds import Found
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .noted_mask import CALLERS_OWN, Recipe, find_noted, recipes, with_recipe
from .way import Way

NAME = "builders"

FUNCTIONS = (
    "_prepare_4d_causal_attention_mask",  # 4.35 on
    "_prepare_4d_causal_attention_mask_for_sdpa",  # 4.36 on
    "build_alibi_tensor",
    "create_causal_mask",  # 4.53 on, like the four below
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_recurrent_attention_mask",
    "create_bidirectional_mask",
)
METHODS = (
    "_prepare_decoder_attention_mask",  # 4.34
    "_prepare_attn_mask",  # 4.34
    "_update_causal_mask",  # 4.38 to 4.52
    "_update_mamba_mask",
    "_update_linear_attn_mask",
    "build_alibi_tensor",
    "get_extended_attention_mask",
)
_MAPPING = "transformers.masking_utils", "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"
"""Through which models around a language model build its masks."""

_OF_TOKENS = ("or_mask_function", "and_mask_function", "block_sequence_ids", "token_type_ids")
"""Arguments with which a mask depends on what the tokens are, such as those of an image."""

_TOKENS, _SMALL = 8, 4


def find(model: nn.Module, way: Way) -> Found:
    files = files_of(model)
    seams = {Seam(each, name, concerns, answer) for each in files for name in FUNCTIONS if _has(each, name)}
    owners = {type(module) for module in way.models}
    seams |= {Seam(each, name, concerns, answer) for each in owners for name in METHODS if hasattr(each, name)}
    mapping = getattr(sys.modules.get(_MAPPING[0]), _MAPPING[1], {})
    keys = [key for key, function in mapping.items() if inspect.isfunction(function)]
    return Found(frozenset(seams | {Seam(":".join(_MAPPING), key, concerns, answer) for key in keys}))


def files_of(model: nn.Module) -> list[str]:
    """Returns the names of the files that the classes of a model come from."""
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return sorted(each for each in names if not each.startswith(("torch.", "builtins")) and each in sys.modules)


def _has(file: str, name: str) -> bool:
    return callable(vars(sys.modules[file]).get(name))


def concerns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return find_noted((*args, *kwargs.values())) is not None


@torch.compiler.disable
def answer(call: Call) -> Tensor | tuple[Tensor, ...]:
    """Answers a builder of masks: a stand-in with the builder's recipe, or as many of them as it makes."""
    given = find_noted(call.arguments.values())
    assert given is not None
    arguments = {name: value for name, value in call.arguments.items() if not _is_absent(name, value)}
    if asked := [name for name in _OF_TOKENS if arguments.get(name) is not None]:
        raise PadfreeError(
            f"{call.original.__qualname__} is called with {', '.join(asked)}: a mask that depends on the row's tokens, "
            "such as those of an image, can't be made for packed examples"
        )
    config = _config_of(arguments)
    tokens = next((arguments[name] for name in _EMBEDDINGS if isinstance(arguments.get(name), Tensor)), None)
    dtype = torch.float32 if tokens is None else tokens.dtype
    plain = {name: str(value) for name, value in arguments.items() if value is None or isinstance(value, _PLAIN)}
    facts = {name: str(value) for name, value in vars(config).items() if _decides(name)} if config is not None else {}
    key = call.original, tuple(sorted(plain.items())), tuple(sorted(facts.items())), dtype
    numbers = recipes.numbers(key, lambda: _recipes_of(call.original, arguments, dtype))
    made = tuple(with_recipe(given, number) for number in numbers)
    return made if len(made) > 1 else made[0]


_EMBEDDINGS = ("inputs_embeds", "input_embeds", "input_tensor")
_READERS = ("alibi", "extended")
"""In the names of builders that read the caller's mask."""
_PLAIN = (bool, int, float, str, torch.dtype)


def _is_absent(name: str, value: object) -> bool:
    """Whether an argument about the tokens' kinds says that all are text."""
    return name == "block_sequence_ids" and isinstance(value, Tensor) and bool((value == -1).all())


def _config_of(arguments: dict[str, Any]) -> Any:
    return arguments.get("config", getattr(arguments.get("self"), "config", None))


def _decides(name: str) -> bool:
    """Whether a value of a config may decide how a mask looks."""
    return any(part in name for part in ("window", "layer_type", "attn", "chunk", "causal"))


def _recipes_of(original: Any, arguments: dict[str, Any], dtype: torch.dtype) -> list[Recipe]:
    """Returns the recipe of each mask that a builder makes: one, or several in a tuple."""
    kept = {name: None if isinstance(value, Tensor) else value for name, value in arguments.items()}
    build = functools.partial(_built, original, kept, dtype, any(part in original.__name__ for part in _READERS))
    try:
        masks = build(_TOKENS, torch.device("cpu"))
    except Exception:  # it reads the caller's mask too
        build = functools.partial(_built, original, kept, dtype, True)
        masks = build(_TOKENS, torch.device("cpu"))
    if not isinstance(masks, tuple):
        return [_recipe(build, kept)]

    def one_of(place: int) -> Callable[..., Any]:
        return lambda *args, **instead: build(*args, **instead)[place]

    return [_recipe(one_of(place), kept) for place in range(len(masks))]


def _recipe(build: Callable[..., Any], arguments: dict[str, Any]) -> Recipe:
    try:
        kind, size = _measured(build, _config_of(arguments), arguments)
    except Exception:  # upstream's own, of a config with a small window: then the mask is made as it is
        kind, size = "other", 0
    return Recipe(build, kind, size)


def _built(
    original: Any,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    reads_mask: bool,
    length: int,
    device: torch.device,
    **instead: Any,
) -> Any:
    """Calls a builder for one sequence. `instead` are other values of its config, or of its arguments."""
    embeddings = torch.empty(1, length, 1, dtype=dtype, device=device)
    mask = CALLERS_OWN.build(length, device)
    stand_ins: dict[str, Any] = {
        **dict.fromkeys(_EMBEDDINGS, embeddings),
        "input_shape": (1, length),
        "past_key_values_length": 0,
        "cache_position": torch.arange(length, device=device),
        "position_ids": torch.arange(length, device=device)[None],
        "attention_mask": mask if reads_mask else None,
        "mask": mask,
        "past_key_values": None,
    }
    given = {name: stand_ins.get(name, value) for name, value in arguments.items()}
    config = _config_of(arguments)
    if instead and config is not None:
        config = copy.copy(config)
        vars(config).update({name: value for name, value in instead.items() if hasattr(config, name)})
        if "config" in given:
            given["config"] = config
        else:
            given["self"] = copy.copy(given["self"])
            given["self"].config = config
    given |= {name: value for name, value in instead.items() if name in given}
    with torch.no_grad(), torch.device(device):
        return original(**given)


def _measured(build: Any, config: Any, arguments: dict[str, Any]) -> tuple[str, int]:
    """Returns the kind and size of a mask, as one of eight tokens with windows and chunks of four looks."""
    sizes = {**_sizes_in(vars(config) if config is not None else {}), **_sizes_in(arguments)}
    mask = build(_TOKENS, torch.device("cpu"), **dict.fromkeys(sizes, _SMALL))
    if mask is None:
        return "causal", 0
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return "other", 0
    keep = (mask if mask.dtype == torch.bool else mask == 0)[0, 0, :, :_TOKENS]
    position = torch.arange(_TOKENS)
    distance, chunk = position[:, None] - position, position // _SMALL
    seen = int(keep[:, 0].sum())
    if torch.equal(keep, distance >= 0):
        return "causal", 0
    if len(set(sizes.values())) != 1:  # which of them is it
        return "other", 0
    (size,) = set(sizes.values())
    if torch.equal(keep, (distance >= 0) & (distance < seen)):
        return "window", size + seen - _SMALL
    if torch.equal(keep, (distance >= 0) & (chunk[:, None] == chunk)):
        return "chunk", size
    return "other", 0


def _sizes_in(values: dict[str, Any]) -> dict[str, int]:
    """Returns what may be the size of a window or chunk of attention, by name."""
    return {
        name: value
        for name, value in values.items()
        if ("window" in name or "attention_chunk" in name)
        and not ("pattern" in name or "layers" in name)  # every how many layers, and from which on
        and type(value) is int
        and value > 0
    }
