"""What the forwards of a patched model do: read the batch once, hide its mask, and leave ordinary calls alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import rope
from .boundaries import LENGTH_ARGUMENTS, PackedBatch, read_batch
from .errors import PadfreeError
from .masks import is_packed_mask, packed_mask
from .registry import is_transformers_model

IGNORED_LABEL = -100

OPT_IN = "_padfree_patch"
"""Attribute by which a module is known as patched (`padfree_patch.seams`)."""


def model_forward(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, is_decoder: bool
) -> Any:
    """Answers a model's forward: its own, called so that a packed batch reaches the layers as such."""
    if _certainly_ordinary(args, kwargs):
        return original(*args, **kwargs)
    kwargs, rotating = _prepared(original, args, kwargs, is_decoder)
    if rotating is None:
        return original(args[0], **kwargs)
    with rope.rotating(rotating):
        return original(args[0], **kwargs)


def _certainly_ordinary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is told to be ordinary by what is in it, without a look at values.

    Traced by torch.compile, unlike the rest: such calls stay one graph. It is a decoder's call with a packed mask too:
    then somebody has wrapped an earlier wrapper of ours, which has done all this.
    """
    if is_packed_mask(kwargs.get("attention_mask")):
        return True
    if len(args) > 2 or any(name in kwargs for name in LENGTH_ARGUMENTS):
        return False
    tokens = args[1] if len(args) == 2 else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or tokens.dim() < 2:
        return True  # upstream says what is wrong
    if tokens.shape[0] == 0 or tokens.shape[1] == 0:
        return False
    one_token_each = tokens.shape[1] == 1  # as in every step of generate
    return one_token_each or (kwargs.get("position_ids") is None and kwargs.get("attention_mask") is None)


@torch.compiler.disable
def _prepared(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_decoder: bool
) -> tuple[dict[str, Any], PackedBatch | None]:
    """The keywords to call `original` with, and the batch if a rotary of the module must know it."""
    module: nn.Module = args[0]
    lengths = {name: kwargs[name] for name in LENGTH_ARGUMENTS if name in kwargs and not _is_generates(name, kwargs)}
    kwargs = {name: value for name, value in kwargs.items() if name not in lengths}
    signature(original).bind(*args, **kwargs)  # or a TypeError as Python's own
    call = {**dict(zip(list(signature(original).parameters)[1:], args[1:])), **kwargs}
    batch = _read(module, call, {name: value for name, value in lengths.items() if value is not None})
    if batch is None:
        return call, None
    _check_packed_call(module, call, is_decoder)
    call["position_ids"] = batch.position_ids
    call["attention_mask"] = packed_mask() if is_decoder else _without_segments(call.get("attention_mask"))
    # A cache of a packed row would be one of several texts at once: nothing could be generated from it.
    call.pop("past_key_values", None)
    if takes_keyword(original, "use_cache"):
        call["use_cache"] = False
    if _is_causal_lm(module):
        _ignore_boundaries(call, batch)
    needs_rotation = is_decoder and any(rope.depends_on_length(child) for child in module.children())
    return call, batch if needs_rotation else None


def _is_generates(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a length argument is one of upstream's generate (4.54 on), for flash-attn: about cache and padding."""
    generating = kwargs.get("past_key_values") is not None and kwargs.get("attention_mask") is not None
    return generating and name != "packed_sequences"


def _read(module: nn.Module, call: dict[str, Any], lengths: dict[str, Any]) -> PackedBatch | None:
    tokens = call.get("input_ids")
    tokens = call.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None  # upstream says what is missing
    if tokens.numel() == 0:
        raise PadfreeError(f"{type(module).__name__}: empty input, the tokens have shape {tuple(tokens.shape)}")
    cache = call.get("past_key_values")
    batch = read_batch(
        (int(tokens.shape[0]), int(tokens.shape[1])),
        tokens.device,
        position_ids=call.get("position_ids"),
        attention_mask=call.get("attention_mask"),
        lengths=lengths,
        generating=cache is not None,
    )
    if batch is not None and (cached := _cached_tokens(cache)):
        raise PadfreeError(
            f"{type(module).__name__}: a packed batch ({batch.sequences}) with a cache that holds {cached} tokens; "
            "pass no past_key_values with packed examples, or no restarting positions with a cache"
        )
    return batch


def _without_segments(mask: Any) -> Tensor | None:
    """What a head may do with a mask, now that the boundaries are known: tell real tokens from padding.

    The auxiliary loss of a mixture of experts is over the real ones.
    """
    if not isinstance(mask, Tensor):
        return None
    return mask if mask.dtype == torch.bool else (mask != 0).to(mask.dtype)


def _cached_tokens(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) and cache[0] is not None else 0  # tuples, before 4.36


def _check_packed_call(module: nn.Module, call: dict[str, Any], is_decoder: bool) -> None:
    name = type(module).__name__
    wants_weights = call.get("output_attentions")
    if wants_weights is None:
        wants_weights = getattr(module.config, "output_attentions", False)
    if wants_weights:
        raise PadfreeError(
            f"{name}: output_attentions of a packed batch: its weights are never computed; switch it off"
        )
    if needs_rows(module):
        raise PadfreeError(
            f"{name} gives one result per row, so a packed row would give one for all its sequences; call its decoder, "
            "and its head on padfree_patch.last_tokens(hidden_states, sequences)"
        )
    decoder = getattr(module, "base_model", module)
    if not is_decoder and is_transformers_model(decoder) and not hasattr(decoder, OPT_IN):
        raise PadfreeError(f"{name} is patched, but the {type(decoder).__name__} in it is not; call apply again")


def needs_rows(module: nn.Module) -> bool:
    """Whether a head makes one result of each row (pooled, or a softmax over its tokens)."""
    return any(head in type(module).__name__ for head in ("ForSequenceClassification", "ForQuestionAnswering"))


def _is_causal_lm(module: nn.Module) -> bool:
    return any(base.__name__.endswith("ForCausalLM") for base in type(module).__mro__)


def _ignore_boundaries(call: dict[str, Any], batch: PackedBatch) -> None:
    """Labels (B, T) are -100 where they say what follows a sequence's last token: that belongs to the next one."""
    cu_seqlens = batch.sequences.cu_seqlens.long()
    for name, places in (("labels", cu_seqlens[:-1]), ("shift_labels", cu_seqlens[1:] - 1)):
        labels = call.get(name)
        if not isinstance(labels, Tensor):
            continue
        if labels.shape != batch.position_ids.shape:
            raise PadfreeError(f"{name} have shape {tuple(labels.shape)}, the tokens {tuple(batch.position_ids.shape)}")
        ignored = labels.reshape(-1).index_fill(0, places.to(labels.device), IGNORED_LABEL)
        call[name] = ignored.view(labels.shape)


@functools.cache
def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of one of upstream's functions, as it is under their decorators."""
    return inspect.signature(function)


def takes_keyword(function: Callable[..., Any], name: str) -> bool:
    takes = signature(function).parameters
    return name in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values())
