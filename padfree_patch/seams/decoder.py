"""The decoder's forward: the batch is read once, and the stand-in for its mask carries it to the layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..batch.packed_batch import PackedBatch
from ..batch.padded_rows import RowOfPadded
from ..errors import PadfreeError
from ..models import implementation_of, pretrained_modules
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.frames import Outside, frames_are_compiled
from ..wrapping.seam import Answer
from .answers import answering, check_head_not_passed_by
from .full_rows import look_at_call
from .hand_over import serve, serve_traced
from .kinds import Found, check_class_found, check_takes
from .last_layer import on_labelled_rows
from .mask import measure
from .model_call import enter, proceed, seams_of, take_batch, tokens_of
from .noise import embed_each_alone
from .rotary import depends_on_length
from .stand_in import Measured, is_stand_in, stand_in, with_measured
from .under_way import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "decoder"

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
"""Values of attn_implementation whose models can be patched."""


def find(model: nn.Module, patch: Patch) -> Found:
    decoders = tuple(module for module in pretrained_modules(model) if patch.is_decoder(module))
    check_class_found(patch, model, patch.decoder, decoders)
    for decoder in decoders:
        check_implementation(patch.model_type, decoder)
        check_takes(patch, decoder, "attention_mask", "position_ids")
    seams = (seam for each in decoders for seam in seams_of(each, answer, enter_decoder, traced=serve_traced))
    return Found(frozenset(seams), decoders)


@torch.compiler.disable(recursive=False)
def answer(call: Call) -> object:
    return _serve(call, _answer)


def _serve(call: Call, answer: Answer) -> object:
    return serve(call, answer, functools.partial(on_labelled_rows, answer))


def _answer(call: Call) -> object:
    if is_stand_in(call.arguments.get("attention_mask")):  # the head has prepared the call
        return call.proceed()
    batch = _prepare(call, compiled=frames_are_compiled())
    if batch is None:
        return proceed(call)
    with Outside(running_decoder, call.module, batch):
        return call.proceed()


@contextmanager
def running_decoder(decoder: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Runs a decoder on a packed batch that its arguments carry already, and checks that every layer has answered."""
    calls_rotary = any(depends_on_length(child) for child in decoder.children())
    with answering(decoder, batch), running(batch=batch) if calls_rotary else nullcontext():
        yield


def enter_decoder(call: Call) -> object:
    return _serve(call, lambda call: enter(call, answer))


@torch.compiler.disable
def _prepare(call: Call, *, compiled: bool) -> PackedBatch | None:
    mask = call.arguments.get("attention_mask")
    of_padded = isinstance(call.arguments.get("packed_sequences"), RowOfPadded)
    batch = take_batch(call)
    look_at_call(call.module, tokens_of(call.arguments), mask, batch)
    if batch is not None:
        if not of_padded:  # whose labels are still the padded batch's
            check_head_not_passed_by(call.module)
        hand_over(call.module, call.arguments, batch, measure(call.module) if compiled else None)
    return batch


def hand_over(decoder: nn.Module, arguments: Arguments, batch: PackedBatch, measured: Measured | None) -> None:
    """Puts the stand-in in the place of the mask that a decoder gets, directly or from its head.

    Args:
        decoder: whose layers are to answer.
        arguments: of the call; changed.
        batch: what the stand-in carries.
        measured: how the decoder's builders mask one sequence, if torch.compile is to trace them.
    """
    check_implementation(type(decoder).__name__, decoder)  # it may have been switched since apply
    embed_each_alone(decoder, arguments, batch)
    mask = stand_in(batch)
    arguments["attention_mask"] = mask if measured is None else with_measured(mask, measured)


def check_implementation(who: str, decoder: PreTrainedModel) -> None:
    """Raises PadfreeError if a decoder is loaded with an attention implementation that no seam answers for."""
    if (implementation := implementation_of(decoder.config)) not in IMPLEMENTATIONS:
        raise PadfreeError(
            f"{who}: loaded with attention implementation {implementation!r}; load it with one of "
            f"{', '.join(IMPLEMENTATIONS)} (padfree_patch picks the kernel of packed batches itself)"
        )
