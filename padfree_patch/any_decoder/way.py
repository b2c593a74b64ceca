"""Way: which places of a model without a registered patch are entered, and how."""

from __future__ import annotations

import dataclasses
import inspect

from torch import nn

from ..models import pretrained_modules
from ..seams.interface import caller_of, can_be_answered
from ..wrapping.call import signature
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import original_of


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to keep the examples of a model apart; `verify` says whether it does."""

    models: tuple[nn.Module, ...]
    """The transformers models that take tokens."""
    fast: tuple[nn.Module, ...]
    """Attention modules whose functions of the interface are answered."""
    split: frozenset[type]
    """Classes whose modules run on each sequence when they are handed the mask."""
    named: frozenset[type] = frozenset()
    """Classes that `verify` named: their modules run on each sequence, handed the mask or not."""
    whole: frozenset[type] = frozenset()
    """Classes whose modules run once on the whole row, with kernels that are told where sequences begin."""

    def with_named(self, cls: type) -> Way:
        """Returns the way to try next, since a module of this class leaks."""
        if cls in self.whole:
            return dataclasses.replace(self, whole=self.whole - {cls}, split=self.split | {cls})
        return dataclasses.replace(self, named=self.named | {cls})

    def with_whole(self, classes: frozenset[type]) -> Way:
        return dataclasses.replace(self, whole=classes, split=self.split - classes)

    def __str__(self) -> str:
        special = {type(each) for each in self.fast if (opt_in := OptIn.of(each)) and opt_in.special}
        parts = [
            ("by a varlen kernel", {type(each) for each in self.fast} - special),
            ("by upstream's function per sequence", special),
            ("by kernels that are told where sequences begin", set(self.whole)),
            ("per sequence", self.split - self.named),
            ("per sequence, named by verify", self.named),
        ]
        shown = [f"{', '.join(sorted(each.__name__ for each in classes))} {how}" for how, classes in parts if classes]
        return "; ".join(shown) or "nothing found to enter"


def ways_of(model: nn.Module) -> list[Way]:
    """Returns the ways to try, the fastest first: by kernels, every attention per sequence, every layer per sequence.

    The last is for layers that make a mask of their own from the one that they are handed (Gemma 2 until 4.52).
    """
    models = tuple(each for each in pretrained_modules(model) if _takes_tokens(each))
    apart = _elsewhere(model, models)
    users = tuple(each for each in model.modules() if each not in apart and can_be_answered(each))
    plain = tuple(each for each in users if not counts_tokens(each))
    others = frozenset(type(each) for each in _innermost(model) if each not in models and each not in apart)
    others -= {type(each) for each in _around(model)}  # NemotronH's block: around a mixer, or an MLP that needs no mask
    answered = frozenset(type(each) for each in users)
    counting = answered - {type(each) for each in plain}
    fast = [Way(models, plain, (others - answered) | counting)] if plain else []
    layers = frozenset(type(each) for each in _in_lists(model) if _takes_mask(each) and each not in apart)
    return [*fast, Way(models, (), others | answered), *([Way(models, (), layers)] if layers else [])]


def _elsewhere(model: nn.Module, models: tuple[nn.Module, ...]) -> set[nn.Module]:
    """Returns the modules of models inside that take no tokens, such as a vision tower: no text runs through them."""
    others = [each for each in pretrained_modules(model) if each not in models]
    towers = [each for each in others if not any(inner in models for inner in each.modules())]
    return {module for tower in towers for module in tower.modules()}


_COUNTING = {"arange", "cumsum", "log", "log1p", "floor"}
"""What the code of a forward calls that works something out from how far in the row a token is."""


def counts_tokens(module: nn.Module) -> bool:
    """Whether an attention module counts the tokens of its row itself, as Llama 4 does for the scale of its queries.

    It may do so from a length on that no check reaches.
    """
    caller = caller_of(module)
    return caller is not None and not _COUNTING.isdisjoint(caller.__code__.co_names)


def parameter_names(module: nn.Module) -> list[str]:
    """Returns what a module's own forward takes by name; nothing for one written in another language."""
    try:
        parameters = signature(original_of(type(module).forward)).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in parameters if each.kind not in (inspect.Parameter.VAR_KEYWORD, each.VAR_POSITIONAL)]


def _takes_tokens(module: nn.Module) -> bool:
    return any(name in ("input_ids", "inputs_embeds") for name in parameter_names(module))


def _innermost(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that take a mask and hold none that does."""
    around = _around(model)
    return [each for each in model.modules() if _takes_mask(each) and each not in around]


def _around(model: nn.Module) -> set[nn.Module]:
    """Returns the modules that take a mask and hold others that do."""
    taking = [each for each in model.modules() if _takes_mask(each)]
    known = set(taking)
    return {each for each in taking if any(child in known for child in each.modules() if child is not each)}


def _in_lists(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model."""
    return [layer for each in model.modules() if isinstance(each, nn.ModuleList) for layer in each]


def _takes_mask(module: nn.Module) -> bool:
    names = parameter_names(module)
    return any(n in ("alibi", "mask") or (n.endswith("_mask") and not n.startswith("encoder")) for n in names)
