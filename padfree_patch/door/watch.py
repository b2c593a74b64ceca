"""What the training batches of a decoder show, on their way in: whether the run is packed, and whether it may be."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter

import torch
from torch import Tensor, nn

from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import read_batch
from ..batch.shapes import isolates
from ..errors import PadfreeError
from ..seams.full_rows import settle
from ..seams.model_call import tokens_of
from ..upstream import Arguments
from ..wrapping.opt_in import OptIn
from .advice import what_to_switch_on
from .say import say

PATIENCE = 10
"""Training forwards without a second sequence after which it is said."""


FULL = 7
"""How many of these must have full rows of one length to be cut from texts; the last one of an epoch is short."""


@dataclasses.dataclass
class Watch:
    """A forward pre-hook of a decoder. It is copied and pickled with it."""

    who: str
    """The model around the decoder, for people."""
    strict: bool
    refusal: str = ""
    """Why the model was left alone; empty if it was patched."""
    forwards: int = 0
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    """How often a row had how many tokens, in those of these without padding."""
    settled: bool = False
    """Whether there is nothing to look for any more."""

    @torch.compiler.disable
    def __call__(self, decoder: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> None:
        """Looks at a call.

        Raises PadfreeError if it is a packed row for a model that was left alone, and `strict` is on.
        """
        if self.settled or not decoder.training or not torch.is_grad_enabled():
            return
        arguments = {**kwargs, "input_ids": args[0]} if args else kwargs
        tokens = tokens_of(arguments)
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        shape, mask = (int(tokens.shape[0]), int(tokens.shape[1])), arguments.get("attention_mask")
        packed, isolated = _is_packed(arguments, shape, tokens.device), isolates(mask, shape)
        if OptIn.of(decoder) is None:
            if self.refusal and packed and not isolated:
                self._refuse()
        elif packed or isolated:
            self.settled = True
        else:
            self._count(tokens, mask)

    def _count(self, tokens: Tensor, mask: object) -> None:
        self.forwards += 1
        if not (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 0).any())):
            self.lengths[int(tokens.shape[1])] += 1
        if self.forwards == PATIENCE:
            self.settled = True
            full_rows = max(self.lengths.values(), default=0) >= FULL
            say(f"{self.who}: {PATIENCE} training batches, and {what_to_switch_on(full_rows=full_rows)}")

    def _refuse(self) -> None:
        text = (
            f"{self.who} was left unpatched, and is now trained on a packed row, whose examples would mix: "
            f"{self.refusal}"
        )
        if self.strict:
            raise PadfreeError(
                f"{text}. Train it on rows of one example, or pass --allow-unpatched to padfree-patch run "
                "(strict=False to autopatch)"
            )
        self.settled = True
        warnings.warn(f"padfree_patch: {text}. Train it on rows of one example", stacklevel=2)


def _is_packed(arguments: Arguments, shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a call has a packed row. One that contradicts itself has none that an unpatched model would mix."""
    try:
        batch = read_batch(
            shape,
            device,
            position_ids=arguments.get("position_ids"),
            attention_mask=arguments.get("attention_mask"),
            lengths={name: arguments[name] for name in LENGTH_ARGUMENTS if arguments.get(name) is not None},
        )
    except PadfreeError:
        return False
    return batch is not None


def watch(model: nn.Module, *, strict: bool, refusal: str = "") -> None:
    """Has the decoder of a model watched, in place of whoever watched it before.

    The decoder, because PEFT calls the forward of the model around it past its hooks.
    """
    decoder: nn.Module = getattr(model, "base_model", model)
    hooks = decoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Watch)]:
        del hooks[key]
        decoder._forward_pre_hooks_with_kwargs.pop(key, None)
    if not refusal:
        settle(model)  # what it would say of full rows is said here, with the tool's name
    decoder.register_forward_pre_hook(Watch(type(model).__name__, strict, refusal), with_kwargs=True)


def is_watched(model: nn.Module) -> bool:
    """Whether a model came through the door before."""
    decoder: nn.Module = getattr(model, "base_model", model)
    return any(isinstance(hook, Watch) for hook in decoder._forward_pre_hooks.values())
