"""NEFTune: the embeddings of each example get the noise of its own length, not of the row's.

The noise that the Trainer's hook adds to embeddings (B, T, D) has the amplitude alpha / sqrt(T * D), so in a packed row
all examples would get too little. Here the embeddings of each example are computed by themselves, by the model's own
module, with whatever hangs on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..upstream import Arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embed_each_alone(decoder: PreTrainedModel, arguments: Arguments, batch: PackedBatch) -> None:
    """Puts embeddings in the place of a packed call's `input_ids`, if noise is added that depends on their shape.

    Raises PadfreeError if the caller gave embeddings: whatever noise they have is the row's.
    """
    embeddings = _embeddings_of(decoder)
    if embeddings is None or not _adds_noise(embeddings):
        return
    if batch.sequences.prefixes is not None:
        raise PadfreeError(
            f"{type(decoder).__name__}: NEFTune's noise is scaled by the length of each example, so that the examples "
            "of a row can't share the embeddings of a prompt; switch neftune_noise_alpha off, or collate without "
            "share_prompts and share_prefixes"
        )
    ids = arguments.pop("input_ids", None)
    if ids is None:
        raise PadfreeError(
            f"{type(decoder).__name__}: NEFTune's noise is scaled by the length of each example, but the call has "
            "inputs_embeds that were computed for the whole row; pass input_ids, or switch neftune_noise_alpha off"
        )
    examples = ids.reshape(1, -1).split(list(batch.sequences.lengths), dim=1)
    arguments["inputs_embeds"] = torch.cat([embeddings(each) for each in examples], dim=1).view(*ids.shape, -1)


def _embeddings_of(decoder: PreTrainedModel) -> nn.Module | None:
    """Returns a decoder's embeddings; None if they were taken out, as PEFT's Shadow does of its own decoder."""
    try:
        found: nn.Module | None = decoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _adds_noise(embeddings: nn.Module) -> bool:
    """Whether training embeddings have NEFTune's hook (transformers' and TRL's), or a forward of their own.

    NEFTune's original code puts such a forward on the instance. accelerate's hooks do so too, but add nothing.
    """
    if not embeddings.training:
        return False
    own = vars(embeddings)
    hooks = embeddings._forward_hooks.values()
    return (
        hasattr(embeddings, "neftune_noise_alpha")
        or any("neftune" in getattr(hook, "__name__", "") for hook in hooks)
        or ("forward" in own and "_hf_hook" not in own)
    )
