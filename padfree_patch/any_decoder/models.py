"""The forwards that a caller calls: they read the batch, and what builds the masks is handed the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..seams.answers import answering
from ..seams.found_ordinary import found_ordinary
from ..seams.full_rows import look_at_call
from ..seams.hand_over import is_awaited, is_waiting, serve
from ..seams.head import ignore_boundaries, mask_of_real_tokens, shown_columns
from ..seams.kinds import Found
from ..seams.labelled import on_labelled_tokens
from ..seams.language_head import predicts_next_tokens
from ..seams.model_call import concerns as concerns_model
from ..seams.model_call import enter, proceed, seams_of, take_batch, tokens_of
from ..seams.noise import embed_each_alone
from ..seams.pooled import pool, pools
from ..seams.under_way import running, sharing_masks
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from .images import check_other_inputs
from .noted_mask import find_noted, noted_mask
from .recorded import join_recorded
from .way import Way, parameter_names

NAME = "models"

_CACHES = ("cache_params", "past_key_value", "state")
"""What recurrent models call their cache."""


def find(model: nn.Module, way: Way) -> Found:
    seams = {seam for each in way.models for seam in seams_of(each, answer, enter_model, shown_columns, concerns)}
    return Found(frozenset(seams), way.models)


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return concerns_model(args, kwargs) and (find_noted(kwargs.values()) is None or is_awaited(args[0]))


def answer(call: Call) -> object:
    return call.proceed() if is_waiting(call.module) else serve(call, _answer)


def _answer(call: Call) -> object:
    if find_noted(call.arguments.values()) is not None:
        return call.proceed()
    batch = _prepare(call)
    if batch is None:
        with found_ordinary(call):
            return on_labelled_tokens(call, proceed)
    served = _several_rows_served(call.module, batch)
    with answering(call.module, batch), running(batch=batch), sharing_masks(), served:
        output = pool(call, batch) if pools(call.module) else on_labelled_tokens(call, Call.proceed)
        join_recorded(output, batch.position_ids.numel())
        return output


@contextmanager
def _several_rows_served(module: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Says of an error in a batch of several rows that a way was verified on one row."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        rows = batch.position_ids.shape[0]
        if rows == 1 or isinstance(error, PadfreeError):
            raise
        raise PadfreeError(
            f"{type(module).__name__} fails on a batch of {rows} packed rows: {error}. The way that was found for it "
            "was verified on one; put all examples into one row, or give it one row at a time"
        ) from error


def enter_model(call: Call) -> object:
    return serve(call, lambda call: enter(call, answer))


@torch.compiler.disable
def _prepare(call: Call) -> PackedBatch | None:
    module, arguments = call.module, call.arguments
    mask = arguments.get("attention_mask")
    batch = take_batch(call)
    builds_masks = inner_model(module) is module
    if builds_masks:
        look_at_call(module, tokens_of(arguments), mask, batch)
    if batch is None:
        return None
    _check_not_recomputed(module)
    check_other_inputs(module, arguments)
    if builds_masks:
        embed_each_alone(module, arguments, batch)
        arguments["attention_mask"] = noted_mask(batch)
    else:
        arguments["attention_mask"] = mask_of_real_tokens(mask, batch)
    if "position_ids" not in parameter_names(module) and (builds_masks or not call.takes("position_ids")):
        arguments.pop("position_ids")
    if not call.takes("attention_mask"):
        arguments.pop("attention_mask")
    for name in _CACHES:
        arguments.pop(name, None)
    if predicts_next_tokens(module):
        ignore_boundaries(arguments, batch)
    return batch


def _check_not_recomputed(module: nn.Module) -> None:
    """Raises PadfreeError if gradient checkpointing would run a module again that is told the batch by this forward."""
    opt_in = OptIn.of(module)
    if opt_in is None or not opt_in.not_recomputed or not (module.training and torch.is_grad_enabled()):
        return
    for each in module.modules():
        if getattr(each, "gradient_checkpointing", False) or type(each).__name__ == "CheckpointWrapper":
            raise PadfreeError(
                f"{type(module).__name__} runs {', '.join(opt_in.not_recomputed)} on each sequence, which gradient "
                "checkpointing would run again on the whole row, so that its gradients would be wrong; call "
                "model.gradient_checkpointing_disable(), or train it on padded batches"
            )


def inner_model(module: nn.Module) -> nn.Module:
    """Returns the model inside one that positions are handed on to; the model itself if it builds masks itself."""
    inner: nn.Module = getattr(module, "base_model", module)
    return inner if "position_ids" in parameter_names(inner) else module
