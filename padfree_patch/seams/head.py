"""The forward of a model around a decoder: no label of a packed row reaches across a boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch.labels import IGNORED_LABEL, ignore_first_labels
from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..models import is_transformers_model, pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call, signature
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import original_of
from .answers import answering
from .found_ordinary import found_ordinary
from .hand_over import is_waiting
from .kinds import Found, check_takes
from .labelled import on_labelled_tokens
from .language_head import predicts_next_tokens
from .model_call import enter, proceed, seams_of, take_batch
from .pooled import pool, pools

NAME = "head"


def find(model: nn.Module, patch: Patch) -> Found:
    heads = tuple(module for module in pretrained_modules(model) if not patch.is_decoder(module))
    for head in heads:
        check_takes(patch, head, "attention_mask", "position_ids")
    return Found(frozenset(seam for each in heads for seam in seams_of(each, answer, enter_head, shown_columns)), heads)


def shown_columns(head: type[Any]) -> tuple[str, ...]:
    """Returns what the signature of a patched head shows beside upstream's: the column that `pack_dataset` makes.

    The Trainer removes every column that no parameter is named after, so a forward that takes position_ids among its
    `**kwargs` only would be given rows without boundaries. (It is not position_ids that are shown: generate would make
    some as soon as the signature has them.)
    """
    parameters = signature(original_of(head.forward)).parameters
    return () if "position_ids" in parameters else ("seq_idx",)


def answer(call: Call) -> Any:
    if is_waiting(call.module):
        return call.proceed()
    batch = _prepare(call)
    with found_ordinary(call) if batch is None else answering(call.module, batch):
        if batch is not None and pools(call.module):
            return pool(call, batch)
        return on_labelled_tokens(call, proceed)


def enter_head(call: Call) -> Any:
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


def ignore_boundaries(arguments: dict[str, Any], batch: PackedBatch) -> None:
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
