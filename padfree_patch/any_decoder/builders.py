"""Upstream's mask builders, wherever a model's classes find them: given a stand-in, they answer with another.

Its recipe calls the very builder for a sequence of a given length. How a mask of eight tokens looks says whether a
varlen kernel can do it; if it can't, the recipe still makes what upstream would.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor, nn

from ..errors import PadfreeError
from ..seams.kinds import Found
from ..upstream import Arguments, Function
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .measured import EMBEDDINGS, OF_THE_ROW, TOKENS, Builder
from .noted_mask import Recipe, find_noted, recipes, with_recipe
from .readings import facts_of, without_weights
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


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
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
    tokens = next((arguments[name] for name in EMBEDDINGS if isinstance(arguments.get(name), Tensor)), None)
    dtype = torch.float32 if tokens is None else tokens.dtype
    key = call.original, facts_of({n: value for n, value in arguments.items() if n not in OF_THE_ROW}), dtype
    numbers = recipes.numbers(key, lambda: _recipes_of(call.original, arguments, dtype))
    made = tuple(with_recipe(given, number) for number in numbers)
    return made if len(made) > 1 else made[0]


_READERS = ("alibi", "extended")
"""In the names of builders that read the caller's mask."""


def _is_absent(name: str, value: object) -> bool:
    """Whether an argument about the tokens' kinds says that all are text."""
    return name == "block_sequence_ids" and isinstance(value, Tensor) and bool((value == -1).all())


def _recipes_of(original: Function, arguments: Arguments, dtype: torch.dtype) -> list[Recipe]:
    """Returns the recipe of each mask that a builder makes: one, or several in a tuple."""
    kept = {name: None if isinstance(value, Tensor) else value for name, value in arguments.items()}
    owner = kept.get("self")
    if isinstance(owner, nn.Module):
        kept["self"] = without_weights(owner)
    reads_mask = any(part in original.__name__ for part in _READERS)
    builder = Builder(original, kept, dtype, reads_mask)
    try:
        masks = builder.build(TOKENS, torch.device("cpu"))
        too_wide = isinstance(masks, Tensor) and masks.shape[-1] == TOKENS + 1  # BART's kin, eager, until 4.57
    except Exception:
        too_wide = True
    if too_wide:  # it reads the caller's mask too
        builder = Builder(original, kept, dtype, True)
        masks = builder.build(TOKENS, torch.device("cpu"))
    if not isinstance(masks, tuple):
        return [builder.recipe()]
    return [builder.recipe(place) for place in range(len(masks))]
