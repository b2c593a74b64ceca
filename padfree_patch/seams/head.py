"""The forward of a model around a decoder: no label of a packed row reaches across a boundary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..batch.labels import IGNORED_LABEL, ignore_first_labels
from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..models import is_transformers_model, pretrained_modules
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call, signature
from ..wrapping.frames import Outside, frames_are_compiled, outside_graphs
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import original_of
from .answers import answering
from .decoder import hand_over, running_decoder
from .found_ordinary import found_ordinary
from .full_rows import look_at_call
from .hand_over import is_waiting
from .kinds import Found, check_takes
from .labelled import on_labelled_tokens
from .language_head import predicts_next_tokens
from .mask import measure
from .model_call import check_what_is_new, enter, proceed, seams_of, take_batch, tokens_of
from .pooled import pool, pools

NAME = "head"


def find(model: nn.Module, patch: Patch) -> Found:
    heads = tuple(module for module in pretrained_modules(model) if not patch.is_decoder(module))
    for head in heads:
        check_takes(patch, head, "attention_mask", "position_ids")
    return Found(frozenset(seam for each in heads for seam in seams_of(each, answer, enter_head, shown_columns)), heads)


def shown_columns(head: type[nn.Module]) -> tuple[str, ...]:
    """Returns what the signature of a patched head shows beside upstream's: the column that `pack_dataset` makes.

    The Trainer removes every column that no parameter is named after, so a forward that takes position_ids among its
    `**kwargs` only would be given rows without boundaries. (It is not position_ids that are shown: generate would make
    some as soon as the signature has them.)
    """
    parameters = signature(original_of(head.forward)).parameters
    return () if "position_ids" in parameters else ("seq_idx",)


@torch.compiler.disable(recursive=False)
def answer(call: Call) -> object:
    if outside_graphs(is_waiting, call.module):
        return call.proceed()
    batch = _prepare(call)
    if batch is None:
        with Outside(found_ordinary, call, _look_for_decoder(call) if frames_are_compiled() else None):
            return on_labelled_tokens(call, proceed)
    if outside_graphs(pools, call.module):
        with Outside(answering, call.module, batch):
            return pool(call, batch)
    decoder = _hand_through(call, batch) if frames_are_compiled() else None
    with Outside(_running, call.module, decoder, batch):
        return on_labelled_tokens(call, proceed)


@contextmanager
def _running(head: nn.Module, decoder: nn.Module | None, batch: PackedBatch) -> Iterator[None]:
    """Runs a head on a packed batch; with the decoder in it, unless that is None."""
    with answering(head, batch), nullcontext() if decoder is None else running_decoder(decoder, batch):
        yield


@torch.compiler.disable
def _look_for_decoder(call: Call) -> nn.Module | None:
    """Returns the patched decoder in a head, which looks at nothing when torch.compile traces it with the head."""
    decoder = _decoder_in(call.module)
    if decoder is not None:
        look_at_call(decoder, tokens_of(call.arguments), call.arguments.get("attention_mask"), None)
    return decoder


def _decoder_in(head: nn.Module) -> nn.Module | None:
    """Returns the patched decoder that a head calls. Gemma 3's, of 4.x, has it not as its `base_model`."""
    for child in (getattr(head, "base_model", head), *head.children()):
        if child is not head and (opt_in := OptIn.of(child)) is not None and opt_in.layers:
            return child
    return None


@torch.compiler.disable
def _hand_through(call: Call, batch: PackedBatch) -> nn.Module | None:
    """Gives the head of a model the stand-in that it passes on, so that torch.compile makes one graph of both.

    Returns the decoder, which then reads nothing itself; None if it is to be called as it is without torch.compile.
    """
    decoder = _decoder_in(call.module)
    if decoder is None or _reads_mask(call) or (measured := measure(decoder)) is None:
        return None
    check_what_is_new(decoder)
    look_at_call(decoder, tokens_of(call.arguments), None, batch)
    hand_over(decoder, call.arguments, batch, measured)
    return decoder


def _reads_mask(call: Call) -> bool:
    """Whether a head reads the mask itself: that of a mixture of experts does, for the loss of its router."""
    asked = call.arguments.get("output_router_logits")
    return bool(getattr(call.module.config, "output_router_logits", False) if asked is None else asked)


def enter_head(call: Call) -> object:
    return enter(call, answer)


@torch.compiler.disable
def _prepare(call: Call) -> PackedBatch | None:
    batch = take_batch(call)
    if batch is None:
        return None
    module, arguments = call.module, call.arguments
    decoder = getattr(module, "base_model", module)
    if is_transformers_model(decoder) and OptIn.of(decoder) is None:
        raise PadfreeError(
            f"{type(module).__name__} is patched, but the {type(decoder).__name__} in it is not; call apply again"
        )
    arguments["attention_mask"] = mask_of_real_tokens(arguments.get("attention_mask"), batch)
    if predicts_next_tokens(module):
        ignore_boundaries(arguments, batch)
    return batch


def mask_of_real_tokens(mask: object, batch: PackedBatch) -> Tensor | None:
    """Returns what a head may do with a mask, now that the boundaries are known: tell real tokens from padding.

    The auxiliary loss of a mixture of experts is over the real ones.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        total, padding = batch.sequences.total, batch.sequences.padding
        real = torch.arange(total, device=batch.position_ids.device) < total - padding
        return real.long().view(batch.position_ids.shape) if padding else None
    return mask if mask.dtype == torch.bool else (mask != 0).to(mask.dtype)


def ignore_boundaries(arguments: Arguments, batch: PackedBatch) -> None:
    """Sets labels (B, T) to -100 where they say what follows a sequence's last token: the next sequence's first.

    Labels may also be those of the tokens whose logits are kept (`logits_to_keep`), as ms-swift gives them.
    """
    keep = next((arguments[name] for name in _KEPT if arguments.get(name) is not None), 0)
    for name in ("labels", "shift_labels"):
        labels = arguments.get(name)
        if not isinstance(labels, Tensor):
            continue
        if labels.shape == batch.position_ids.shape:
            arguments[name] = ignore_first_labels(labels, batch.sequences, shifted=name == "shift_labels")
        else:
            arguments[name] = _ignore_after_ends(name, labels, keep, batch)


_KEPT = ("logits_to_keep", "num_logits_to_keep")
"""What a head calls the tokens whose logits it is to compute: the last so many, or a mask or indices of them (T,)."""


def _ignore_after_ends(name: str, labels: Tensor, keep: int | Tensor, batch: PackedBatch) -> Tensor:
    """Sets labels (B, kept) to -100 where the one before them, as upstream shifts them, is a sequence's last token."""
    shape = batch.position_ids.shape
    ends = torch.zeros(batch.sequences.total, dtype=torch.bool, device=labels.device)
    ends = ends.index_fill_(0, batch.sequences.ends().to(labels.device), True).view(shape)
    kept = ends[:, keep] if isinstance(keep, Tensor) else ends[:, -keep:]
    if labels.shape != kept.shape or name == "shift_labels":
        raise PadfreeError(f"{name} have shape {tuple(labels.shape)}, the tokens {tuple(shape)}")
    crosses = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, :-1]], dim=1)
    return labels.long().masked_fill(crosses, IGNORED_LABEL)
