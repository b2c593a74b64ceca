"""A builder of masks, called for one sequence of any length, and what its mask shows: windows, chunks, or neither.

Whether a kernel can do the mask is measured on eight tokens, with every number that the builder reads of the config, or
is given, set to four: a window of 4096 would not show in any short mask, whatever its name is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..upstream import Arguments, Function
from .noted_mask import CALLERS_OWN, Recipe
from .readings import ReadConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDINGS = ("inputs_embeds", "input_embeds", "input_tensor")
"""What builders call the tokens, whose shape and dtype they look at."""

OF_THE_ROW = (
    *EMBEDDINGS,
    "input_shape",
    "past_key_values_length",
    "cache_position",
    "position_ids",
    "attention_mask",
    "mask",
    "past_key_values",
)
"""Arguments that say what the row of a call is like. A sequence gets its own, so that no recipe depends on them."""

TOKENS, _SMALL, _LARGE = 8, 4, 64


def config_of(arguments: Arguments) -> PretrainedConfig | None:
    """Returns the config that a builder is given, or that of the module whose method it is."""
    return arguments.get("config", getattr(arguments.get("self"), "config", None))


class Builder:
    """One way in which a model calls a builder."""

    def __init__(self, original: Function, arguments: Arguments, dtype: torch.dtype, reads_mask: bool):
        """Takes the builder, its arguments without tensors, the tokens' dtype, and if it wants the caller's mask."""
        self._original, self._arguments = original, arguments
        self._dtype, self._reads_mask = dtype, reads_mask
        # transformers' own use positions for nothing but to look for several sequences, and wait for the device.
        self._looks_for_sequences = hasattr(sys.modules[original.__module__], "find_packed_sequence_indices")
        self._numbers: dict[str, int] = {}
        self._unclear: set[str] = set()

    def recipe(self, place: int | None = None) -> Recipe:
        """Returns the recipe of the only mask that the builder makes, or of one of several."""

        def build(length: int, device: torch.device, **instead: int) -> object:
            made = self.build(length, device, **instead)
            return made if place is None else made[place]

        try:
            kind, size = self._measured(build)
        except Exception:  # upstream's own, of numbers that fit nothing: then the mask is made as it is
            kind, size = "other", 0
        return Recipe(build, kind, size)

    def build(self, length: int, device: torch.device, **instead: int) -> Any:
        """Calls the builder for one sequence. `instead` are other values of numbers that it reads, or is given."""
        mask, counted = CALLERS_OWN.build(length, device), torch.arange(length, device=device)
        tokens = torch.empty(1, length, 1, dtype=self._dtype, device=device)
        callers = mask if self._reads_mask else None
        positions = None if self._looks_for_sequences else counted[None]
        values = (tokens, tokens, tokens, (1, length), 0, counted, positions, callers, mask, None)
        own = dict(zip(OF_THE_ROW, values, strict=True))
        given = {name: own.get(name, value) for name, value in self._arguments.items()}
        given |= {name: value for name, value in instead.items() if name in given}
        if instead and (config := config_of(given)) is not None:
            self._exchange_config(given, ReadConfig(config, instead, self._numbers, self._unclear))
        with torch.no_grad(), torch.device(device):
            made = self._original(**given)
        # GLM-5-next makes a mask of ones where this one is None, as it is alone; it is not where a stand-in is.
        return mask if made is None and "recurrent" in self._original.__name__ else made

    @staticmethod
    def _exchange_config(given: Arguments, config: ReadConfig) -> None:
        if "config" in given:
            given["config"] = config
        else:
            owner: nn.Module = copy.copy(given["self"])
            vars(owner)["config"] = config
            given["self"] = owner

    def _measured(self, build: Callable[..., object]) -> tuple[str, int]:
        """Returns the kind and size of a mask, as one of eight tokens looks with small numbers."""
        given = {name: value for name, value in self._arguments.items() if name not in OF_THE_ROW}
        sizes = {name: value for name, value in given.items() if type(value) is int and value > 0}

        def looks(**instead: int) -> Tensor | None:
            return _shown(build(TOKENS, torch.device("cpu"), nothing=0, **instead))

        keep = looks(**dict.fromkeys(sizes, _SMALL))
        while new := {name: n for name, n in self._numbers.items() if n > 0 and name not in sizes}:
            sizes |= new  # those that it reads only if others are small
            keep = looks(**dict.fromkeys(sizes, _SMALL))
        if self._unclear or self._window_of_module():
            return "other", 0
        causal = _distances() >= 0
        if keep is None or torch.equal(keep, causal):
            return "causal", 0
        ways = {name: looks(**{**dict.fromkeys(sizes, _LARGE), name: _SMALL}) for name in sizes}
        deciding = {n: shown for n, shown in ways.items() if shown is not None and not torch.equal(shown, causal)}
        if len(deciding) != 1 or not torch.equal(keep, *deciding.values()):
            return "other", 0
        (name,) = deciding
        size, seen = sizes[name], int(keep[:, 0].sum())
        if torch.equal(keep, causal & (_distances() < seen)):
            return "window", size + seen - _SMALL
        chunk = torch.arange(TOKENS) // _SMALL
        return ("chunk", size) if torch.equal(keep, causal & (chunk[:, None] == chunk)) else ("other", 0)

    def _window_of_module(self) -> bool:
        """Whether the module, whose method the builder is, has a number of its own that may be a window."""
        own = vars(self._arguments.get("self", self))
        return any(("window" in name or "chunk" in name) and type(value) is int for name, value in own.items())


def _distances() -> Tensor:
    position = torch.arange(TOKENS)
    return position[:, None] - position


def _shown(mask: object) -> Tensor | None:
    """Returns which keys (T, T) a mask lets queries see; None if there is no mask, where upstream leaves it causal.

    Raises ValueError if it is no mask of pairs.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError("no mask of pairs")
    return (mask if mask.dtype == torch.bool else mask == 0)[0, 0, :, :TOKENS]
