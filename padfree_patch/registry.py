"""Patch, what an architecture says of itself, and the entry-point registry that finds the one for a model."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .batch.packed_batch import PackedBatch
from .errors import PadfreeError
from .models import check_is_module, pretrained_modules
from .wrapping.call import Call

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENTRY_POINT_GROUP = "padfree_patch.patches"


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call of an attention module on a packed batch, about to be made; `Patch.attention_call` returns a changed one.

    `dataclasses.replace(call, key_bias=...)` makes a copy with another bias. One with other arguments is made by
    `dataclasses.replace(call, call=call.call.changed(attention_mask=None))`.
    """

    call: Call
    """`call.module` is the attention module, `call.arguments` its arguments by name, `call.original` its forward."""
    batch: PackedBatch
    """`batch.sequences` says where the sequences end; `position_ids` and `positions_from_zero` of it are (B, T).

    A sequence may go on from a prompt that examples share: then `positions_from_zero` count from where that begins.
    """
    key_bias: Tensor | None = None
    """What is added to the scores of each key before they are scaled, (H, B * T), or None."""


@dataclasses.dataclass(frozen=True)
class Patch:
    """One architecture: what its classes are called, where it was tested, and how small it can be built for tests."""

    model_type: str
    """`config.model_type` of the models it is for."""
    attention: str
    """Name of the attention class. Its subclasses (`...SdpaAttention`, a remote copy) count too."""
    decoder: str
    """Name of the class whose forward builds the attention mask and runs the layers."""
    transformers: str
    """Versions that the tests ran on, such as ">=4.36,<5.25"."""
    tiny: Mapping[str, object] = dataclasses.field(default_factory=dict, hash=False)
    """Config values of a model small enough for a test, on top of `padfree_patch.testing.TINY`."""
    upstream_refuses: Callable[[PretrainedConfig], str | None] | None = None
    """Says of a config why upstream can't run its model at all, so that `verify` has no example alone to compare with;
    None if it can."""
    attention_call: Callable[[AttentionCall], AttentionCall] | None = None
    """For attention that needs more than another kernel: given each packed call of an attention module, returns the
    call to make instead."""
    attention_call_needs: str = ""
    """Value of the config which, if it is false, says that `attention_call` changes nothing; "" if it always may."""
    attention_call_knows_prompts: bool = False
    """Whether what `attention_call` does is right where sequences go on from shared prompts too
    (`PackedSequences.prefixes`); if not, such rows are refused."""
    quirks: Callable[[PretrainedConfig], list[str]] | None = None
    """Says of a config what upstream does with its model, in the running version, that one would not expect."""
    variants: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict, hash=False)
    """Other configurations to test, by name: values on top of `tiny`."""
    any_decoder: bool = False
    """Whether its attention is more than a causal softmax over a window (sinks, chunks, a state), so that its models
    are entered in the first way of those for any decoder that passes the check."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiny", MappingProxyType(dict(self.tiny)))
        object.__setattr__(self, "variants", MappingProxyType(dict(self.variants)))

    def is_attention(self, module: nn.Module) -> bool:
        return _is_a(module, self.attention)

    def is_decoder(self, module: nn.Module) -> bool:
        return _is_a(module, self.decoder)


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(module).__mro__)


class Registry:
    """Patches by model type; a name can be taken once."""

    def __init__(self, patches: Iterable[Patch] = ()):
        self._patches: dict[str, Patch] = {}
        for patch in patches:
            self.register(patch)

    def register(self, patch: Patch) -> None:
        """Raises PadfreeError if the model type is taken."""
        if patch.model_type in self._patches:
            raise PadfreeError(
                f"a patch for {patch.model_type!r} is registered already: {self._patches[patch.model_type]}; "
                f"registered: {', '.join(self.model_types())}"
            )
        self._patches[patch.model_type] = patch

    def model_types(self) -> list[str]:
        return sorted(self._patches)

    def patches(self) -> list[Patch]:
        return [self._patches[name] for name in self.model_types()]

    def get(self, model_type: str | None) -> Patch | None:
        return self._patches.get(model_type or "")


@functools.cache
def registry() -> Registry:
    """Finds every patch of the installed packages, ours and others', by the entry points of `padfree_patch.patches`.

    Raises PadfreeError if one does not load or two claim the same model type.
    """
    found = Registry()
    for entry_point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            patch = entry_point.load()
        except Exception as error:
            raise PadfreeError(
                f"entry point {entry_point.name} = {entry_point.value} does not load: {error}"
            ) from error
        if not isinstance(patch, Patch):
            raise PadfreeError(f"entry point {entry_point.name} = {entry_point.value} is no Patch: {patch!r}")
        found.register(patch)
    return found


def found_by_check(patch: Patch | None) -> bool:
    """Whether only a check says in which way a model is right: it has no patch, or one that says so."""
    return patch is None or patch.any_decoder


def patch_for(model: nn.Module) -> Patch | None:
    """Returns the patch that is registered for the outermost transformers model in `model`; None if none is.

    Raises PadfreeError if there is no transformers model in it.
    """
    check_is_module(model)
    return registry().get(model_type_of(model))


def model_type_of(model: nn.Module) -> str:
    """Returns the model type of the outermost transformers model in `model`.

    Raises PadfreeError if there is none.
    """
    models = pretrained_modules(model)
    if not models:
        raise PadfreeError(f"{type(model).__name__} is not a transformers model and holds none")
    outermost = models[0]
    return str(getattr(outermost.config, "model_type", None))
