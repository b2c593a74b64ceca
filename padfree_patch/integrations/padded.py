"""Padded batches computed as one packed row, for trainers whose losses need a row per example: TRL's DPO, rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch.padded_rows import RowOfPadded
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..seams.model_call import CACHE_ARGUMENTS, tokens_of
from ..seams.under_way import under_way
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import original_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
"""Arguments of a decoder that have a value per token, which the row takes along."""


class PackedInside:
    """What `pack_padded` returns: `remove()` ends it, and so does the end of a `with` block."""

    def __init__(self, *hooks: RemovableHandle):
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> PackedInside:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def pack_padded(model: nn.Module) -> PackedInside:
    """Lets a patched model compute padded batches without their padding: its decoder is given one packed row.

    What is around the decoder (heads, pooling, losses, trainers) gets what it would get of the padded batch, with zeros
    where padding stands. So trainers that need a row per example train padding-free with collators of their own: TRL's
    DPOTrainer and RewardTrainer, for example. A deep copy, such as a reference model, packs too.

    Packed are calls with a 0/1 `attention_mask` (B, T) that shows padding at the ends of rows, and no cache
    (`use_cache=True` asks for one); each costs one device sync. All others are left as they are: generation, batches
    without padding, packed rows, those whose rows PEFT looks at (`adapter_names`, Poly, X-LoRA, activated LoRA), and
    whatever comes after `restore`.

    Calling it twice is calling it once; the first call's `remove` ends it.

    Raises PadfreeError if the model is not patched, or has several decoders.
    """
    decoder = _decoder_of(model)
    if _pad in decoder._forward_hooks.values():
        return PackedInside()
    before = decoder.register_forward_pre_hook(_pack, prepend=True, with_kwargs=True)  # who watches sees the row
    return PackedInside(before, decoder.register_forward_hook(_pad, with_kwargs=True))


def _decoder_of(model: nn.Module) -> nn.Module:
    """Returns the patched transformers model that has no other inside."""
    patched = [module for module in pretrained_modules(model) if module in OptIn.all_in(model)]
    inner = [module for module in patched if not any(other in patched for other in pretrained_modules(module)[1:])]
    if not inner:
        raise PadfreeError(f"{type(model).__name__} is not patched; call padfree_patch.apply(model) before pack_padded")
    if len(inner) > 1:
        names = ", ".join(type(module).__name__ for module in inner)
        raise PadfreeError(f"{type(model).__name__} has several decoders ({names}); call pack_padded on the one meant")
    return inner[0]


@torch.compiler.disable
def _pack(
    decoder: nn.Module, args: tuple[object, ...], kwargs: Arguments
) -> tuple[tuple[object, ...], Arguments] | None:
    call = Call(original_of(type(decoder).forward), (decoder, *args), kwargs)
    if under_way.keeps_rows:
        return None
    given, mask, tokens = call.arguments, call.arguments.get("attention_mask"), tokens_of(call.arguments)
    if OptIn.of(decoder) is None or tokens is None or not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        return None
    if id(decoder) in under_way.generating or _asks_for_cache(given) or (row := RowOfPadded.of_mask(mask)) is None:
        return None
    others = {name: value for name, value in given.items() if name not in (call.names[0], *_OF_PADDED, *_PER_TOKEN)}
    per_token = {name: row.pack(given[name]) for name in _PER_TOKEN if isinstance(given.get(name), Tensor)}
    return (), {**others, **per_token, "packed_sequences": row}


_OF_PADDED = ("attention_mask", "cache_position")
"""Arguments that are about the padded batch, and not about the row."""


def _asks_for_cache(arguments: Arguments) -> bool:
    return arguments.get("use_cache") is True or any(arguments.get(name) is not None for name in CACHE_ARGUMENTS)


@torch.compiler.disable
def _pad(decoder: nn.Module, args: tuple[object, ...], kwargs: Arguments, output: object) -> object:
    row = kwargs.get("packed_sequences")
    return row.pad(output) if isinstance(row, RowOfPadded) else None
