"""The attention mask of a packed row: never built, only what its window would be is kept.

A packed row has no mask of T x T. What travels from the decoder to its layers instead is a tensor of shape
(1, 1, 1, 1, window + 1): ordinary masks have at most four dimensions, so it cannot be mistaken; being an argument, it
survives gradient checkpointing, replicas and other threads; and a shape is read without a device sync. Its one value
lies on the CPU, because decoders before 4.45 ask `0 in attention_mask`: of models loaded as flash_attention_2 they drop
a mask without a 0 (4.35 on), or take one with a 0 for padding (4.34).

Upstream's mask builders are asked for the window. What they build is the truth for the version, the implementation
and the layer at hand (by one token or altogether it differs between them), so the size is read off a mask of eight
tokens that the very builder makes with a window of four.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import versions
from .errors import PadfreeError

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

_PROBE_TOKENS, _PROBE_WINDOW = 8, 4


def packed_mask(window: int = 0) -> Tensor:
    """What stands for the mask of a packed row. `window`: newest tokens that a query sees, itself included; 0: all."""
    value = int(versions.inside(versions.transformers_version(), "<4.35"))
    return torch.full((), value, device="cpu").expand(1, 1, 1, 1, window + 1)


def is_packed_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 5


def window_of(mask: Tensor) -> int:
    return mask.shape[4] - 1


def build_alibi(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers upstream's `build_alibi_tensor`: a packed row has none, its patch gives each sequence its own."""
    return None if any(is_packed_mask(value) for value in (*args, *kwargs.values())) else original(*args, **kwargs)


def build_mask(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers a call of one of upstream's builders: for a packed row with the window, else as upstream does."""
    if not any(is_packed_mask(value) for value in (*args, *kwargs.values())):
        return original(*args, **kwargs)
    return _answer(original, args, kwargs)


@torch.compiler.disable
def _answer(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return packed_mask(_window(original, args, kwargs))


def _window(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a query would see under the mask which `original` would build, itself included; 0 for all."""
    call = dict(_signature(original).bind(*args, **kwargs).arguments)
    if "input_shape" in call:  # 4.34 on: the window is an argument
        size = call.get("sliding_window")
        return _adjusted(original, size, functools.partial(_probe_function, call), size) if size else 0
    owner = call.get("self")  # 4.38 to 4.52: a method, which reads its config
    config = owner.config if owner is not None else call["config"]  # 4.53 on: an argument
    size = getattr(config, "sliding_window", None)
    if not size:
        return 0
    # What in a config decides about windows; the measured size is kept per combination.
    facts = tuple(
        (k, str(v)) for k, v in sorted(vars(config).items()) if "window" in k or "layer_type" in k or "attn" in k
    )
    return _adjusted(original, size, functools.partial(_probe_with_config, call, owner, config), facts)


def _probe_function(call: dict[str, Any], original: Callable[..., Any]) -> Tensor | None:
    embeds = torch.empty(1, _PROBE_TOKENS, 1)
    stand_ins = {
        "self": call.get("self"),
        "input_shape": embeds.shape[:2],
        "inputs_embeds": embeds,
        "past_key_values_length": 0,
        "sliding_window": _PROBE_WINDOW,
    }
    mask: Tensor | None = original(**{name: stand_ins.get(name) for name in call})
    return mask


def _probe_with_config(call: dict[str, Any], owner: Any, config: Any, original: Callable[..., Any]) -> Tensor | None:
    small = copy.copy(config)
    small.sliding_window = _PROBE_WINDOW
    embeds = torch.empty(1, _PROBE_TOKENS, 1)
    stand_ins: dict[str, Any] = {
        "config": small,
        "input_tensor": embeds,
        "inputs_embeds": embeds,
        "input_embeds": embeds,  # its name until 5.2
        "cache_position": torch.arange(_PROBE_TOKENS),
        "use_cache": False,
        "output_attentions": False,
    }
    arguments = {name: stand_ins.get(name) for name in call if name != "self"}
    if owner is not None:
        decoder = copy.copy(owner)  # shallow: shares the layers, which the builder does not touch
        decoder.config = small
        arguments["self"] = decoder
    mask: Tensor | None = original(**arguments)
    return mask


_measured: dict[tuple[Any, ...], int | None] = {}
"""Tokens by which the effective window differs from the configured one, per builder and config; None: no window."""


def _adjusted(original: Callable[..., Any], size: int, probe: Callable[..., Tensor | None], facts: Any) -> int:
    key = (original, facts)
    if key not in _measured:
        with torch.no_grad(), torch.device("cpu"):
            _measured[key] = _measure(probe(original), original)
    difference = _measured[key]
    return 0 if difference is None else size + difference


def _measure(mask: Tensor | None, original: Callable[..., Any]) -> int | None:
    if mask is None:  # upstream leaves it to is_causal
        return None
    if not isinstance(mask, Tensor):
        raise PadfreeError(f"{original.__qualname__} builds a {type(mask).__name__}: load the model as sdpa or eager")
    keep = (mask if mask.dtype == torch.bool else mask == 0)[0, 0, :, :_PROBE_TOKENS]
    seen = int(keep[:, 0].sum())
    position = torch.arange(_PROBE_TOKENS)
    distance = position[:, None] - position
    if not torch.equal(keep, (distance >= 0) & (distance < seen)):
        raise PadfreeError(
            f"{original.__module__}.{original.__qualname__} builds no causal sliding window, but\n{keep.int()}"
        )
    return None if seen == _PROBE_TOKENS else seen - _PROBE_WINDOW


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
