"""What the forwards of a patched model do: read the batch once, hide its mask, and leave ordinary calls alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import rope
from .boundaries import LENGTH_ARGUMENTS, PackedBatch, read_batch
from .errors import PadfreeError
from .kernel_call import packed_attention
from .masks import is_packed_mask, packed_mask

IGNORED_LABEL = -100


def attention_forward(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, backend: str
) -> Any:
    """Answers an attention module's forward: its own, or for a packed batch its own with another kernel."""
    if is_packed_mask(kwargs.get("attention_mask")):
        return packed_attention(original, backend, args, kwargs)
    return original(*args, **kwargs)


def model_forward(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, is_decoder: bool
) -> Any:
    """Answers a model's forward: its own, called so that a packed batch reaches the layers as such."""
    kwargs, rotating = _prepared(original, args, kwargs, is_decoder)
    if rotating is None:
        return original(args[0], **kwargs)
    with rope.rotating(rotating):
        return original(args[0], **kwargs)


@torch.compiler.disable
def _prepared(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_decoder: bool
) -> tuple[dict[str, Any], PackedBatch | None]:
    """The keywords to call `original` with, and the batch if a rotary of the module must know it."""
    module: nn.Module = args[0]
    names = list(parameters(original))
    call = {**dict(zip(names[1:], args[1:])), **kwargs}
    lengths = {name: call.pop(name) for name in LENGTH_ARGUMENTS if name in call}
    batch = _read(module, call, {name: value for name, value in lengths.items() if value is not None})
    if batch is None:
        return call, None
    _check_packed_call(module, call)
    call["position_ids"] = batch.position_ids
    call["attention_mask"] = packed_mask(batch.position_ids.device) if is_decoder else None
    # A cache of a packed row would be one of several texts at once: nothing could be generated from it.
    call.pop("past_key_values", None)
    if takes_keyword(original, "use_cache"):
        call["use_cache"] = False
    if _is_causal_lm(module) and isinstance(labels := call.get("labels"), Tensor):
        call["labels"] = _without_first_tokens(labels, batch)
    needs_rotation = is_decoder and any(rope.depends_on_length(child) for child in module.children())
    return call, batch if needs_rotation else None


def _read(module: nn.Module, call: dict[str, Any], lengths: dict[str, Any]) -> PackedBatch | None:
    tokens = call.get("input_ids")
    tokens = call.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None  # upstream says what is missing
    if tokens.numel() == 0:
        raise PadfreeError(f"{type(module).__name__}: empty input, the tokens have shape {tuple(tokens.shape)}")
    shape = (int(tokens.shape[0]), int(tokens.shape[1]))
    if shape[1] == 1 and not lengths:
        return None  # one token per row, as in every step of generate
    batch = read_batch(
        shape,
        tokens.device,
        position_ids=call.get("position_ids"),
        attention_mask=call.get("attention_mask"),
        lengths=lengths,
    )
    if batch is not None and (cached := _cached_tokens(call.get("past_key_values"))):
        raise PadfreeError(
            f"{type(module).__name__}: a packed batch ({batch.sequences}) with a cache that holds {cached} tokens; "
            "pass no past_key_values with packed examples, or no restarting positions with a cache"
        )
    return batch


def _cached_tokens(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) and cache[0] is not None else 0  # tuples, before 4.36


def _check_packed_call(module: nn.Module, call: dict[str, Any]) -> None:
    name = type(module).__name__
    wants_weights = call.get("output_attentions")
    if wants_weights is None:
        wants_weights = getattr(module.config, "output_attentions", False)
    if wants_weights:
        raise PadfreeError(
            f"{name}: output_attentions of a packed batch: its weights are never computed; switch it off"
        )
    if "ForSequenceClassification" in name:
        raise PadfreeError(
            f"{name} pools one token per row, so a packed row would give one result for all its sequences"
        )


def _is_causal_lm(module: nn.Module) -> bool:
    return any(base.__name__.endswith("ForCausalLM") for base in type(module).__mro__)


def _without_first_tokens(labels: Tensor, batch: PackedBatch) -> Tensor:
    """labels (B, T) with -100 where a sequence begins: its first token is predicted from the sequence before."""
    if labels.shape != batch.position_ids.shape:
        raise PadfreeError(f"labels have shape {tuple(labels.shape)}, the tokens {tuple(batch.position_ids.shape)}")
    begins = batch.sequences.cu_seqlens[:-1].to(labels.device, torch.int64)
    return labels.reshape(-1).index_fill(0, begins, IGNORED_LABEL).view(labels.shape)


@functools.cache
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, `self` included, as upstream declares them under its decorators and ours."""
    return inspect.signature(function).parameters


def takes_keyword(function: Callable[..., Any], name: str) -> bool:
    takes = parameters(function)
    return name in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values())
