"""The decoder's forward: the batch is read once, and the stand-in for its mask carries it to the layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..batch.packed_batch import PackedBatch
from ..batch.padded_rows import RowOfPadded
from ..errors import PadfreeError
from ..models import implementation_of, pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call
from .answers import answering, check_head_not_passed_by
from .full_rows import look_at_call
from .hand_over import serve
from .kinds import Found, check_class_found, check_takes
from .model_call import enter, proceed, seams_of, take_batch, tokens_of
from .noise import embed_each_alone
from .rotary import depends_on_length
from .stand_in import stand_in
from .under_way import running

NAME = "decoder"

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
"""Values of attn_implementation whose models can be patched."""


def find(model: nn.Module, patch: Patch) -> Found:
    decoders = tuple(module for module in pretrained_modules(model) if patch.is_decoder(module))
    check_class_found(patch, model, patch.decoder, decoders)
    for decoder in decoders:
        check_implementation(patch.model_type, decoder)
        check_takes(patch, decoder, "attention_mask", "position_ids")
    return Found(frozenset(seam for each in decoders for seam in seams_of(each, answer, enter_decoder)), decoders)


def answer(call: Call) -> Any:
    return serve(call, _answer)


def _answer(call: Call) -> Any:
    batch = _prepare(call)
    if batch is None:
        return proceed(call)
    calls_rotary = any(depends_on_length(child) for child in call.module.children())
    with answering(call.module, batch), running(batch=batch) if calls_rotary else nullcontext():
        return call.proceed()


def enter_decoder(call: Call) -> Any:
    return serve(call, lambda call: enter(call, answer))


@torch.compiler.disable
def _prepare(call: Call) -> PackedBatch | None:
    mask = call.arguments.get("attention_mask")
    of_padded = isinstance(call.arguments.get("packed_sequences"), RowOfPadded)
    batch = take_batch(call)
    look_at_call(call.module, tokens_of(call.arguments), mask, batch)
    if batch is not None:
        check_implementation(type(call.module).__name__, call.module)  # it may have been switched since apply
        if not of_padded:  # whose labels are still the padded batch's
            check_head_not_passed_by(call.module)
        embed_each_alone(call.module, call.arguments, batch)
        call.arguments["attention_mask"] = stand_in(batch)
    return batch


def check_implementation(who: str, decoder: Any) -> None:
    """Raises PadfreeError if a decoder is loaded with an attention implementation that no seam answers for."""
    if (implementation := implementation_of(decoder.config)) not in IMPLEMENTATIONS:
        raise PadfreeError(
            f"{who}: loaded with attention implementation {implementation!r}; load it with one of "
            f"{', '.join(IMPLEMENTATIONS)} (padfree_patch picks the kernel of packed batches itself)"
        )
