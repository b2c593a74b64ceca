"""Whether a packed call was answered: what somebody replaces after `apply` could go past us, and nothing would show.

While a packed forward runs, the kernels note which attention modules they answered for. On leaving it, every layer
whose attention is patched must have answered, or the call is an error that names those that did not. Nothing is read
from the device. A layer that is recomputed in the backward is no forward of a model: nothing is expected of it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..models import is_transformers_model
from ..registry import Patch, registry
from ..upstream import Function
from ..wrapping.opt_in import ATTRIBUTE, OptIn
from ..wrapping.seam import is_wrapper
from .under_way import under_way

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a function that somebody put in our place may raise, given a stand-in for the mask."""


class Answers:
    """The attention modules that have answered since a packed forward of a model began."""

    def __init__(self, model: nn.Module, batch: PackedBatch, outer: Answers | None):
        self.model, self.batch, self.outer = model, batch, outer
        self.modules: set[nn.Module] = set()
        self.by_graphs = 0
        """Kernel calls of graphs that torch.compile made, in which a layer is no module any more."""


def note_answer(module: nn.Module | None) -> None:
    """Notes in every packed forward that is under way in this thread that an attention module has answered.

    None stands for one of a graph that torch.compile made.
    """
    answers = under_way.answers
    while answers is not None:
        if module is None:
            answers.by_graphs += 1
        else:
            answers.modules.add(module)
        answers = answers.outer


@contextmanager
def answering(model: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Runs a packed forward of a decoder, or of a model around one, and checks on leaving it that it was answered.

    A decoder inside finds the batch again, if it is handed a copy of the positions.

    Raises PadfreeError that names who did not answer, and what was replaced since `apply`.
    """
    mine = _begin(model, batch)
    try:
        yield
    except PadfreeError:
        raise
    except _ERRORS as error:
        _raise_if_replaced(mine, error)
        raise
    finally:
        _end(mine)
    _check(mine)


@torch.compiler.disable
def _begin(model: nn.Module, batch: PackedBatch) -> Answers:
    under_way.answers = Answers(model, batch, under_way.answers)
    return under_way.answers


@torch.compiler.disable
def _end(answers: Answers) -> None:
    under_way.answers = answers.outer


@torch.compiler.disable
def _raise_if_replaced(answers: Answers, error: Exception) -> None:
    layers, opt_in = _layers(answers.model), OptIn.of(answers.model)
    gone = opt_in is not None and not opt_in.way and len(layers) < opt_in.layers  # in whose place others may stand
    found = replaced(answers.model) if gone or _silent(answers, layers) else []
    if gone or found:
        raise PadfreeError(_message(answers.model, f"fails with {error!r}", found)) from error


@torch.compiler.disable
def _check(answers: Answers) -> None:
    """Raises PadfreeError unless every layer has answered that must."""
    model, opt_in = answers.model, OptIn.of(answers.model)
    if opt_in is not None and opt_in.trying:  # verify says what the way misses
        opt_in.answered = len(answers.modules) + answers.by_graphs
        return
    layers = _layers(model)
    silent = _silent(answers, layers)
    if silent or not (answers.modules or answers.by_graphs):
        names = [f"{name} ({type(each).__name__})" for name, each in model.named_modules() if each in silent]
        shown = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "any attention module"
        raise PadfreeError(_message(model, f"was not answered by {shown}, so its examples mix", replaced(model)))
    if opt_in is None:
        return
    reached = len(answers.modules) + answers.by_graphs if opt_in.way else len(layers)
    if opt_in.layers > reached and not (opt_in.way and drops_layers(model)):
        problem = f"ran {reached} layers with patched attention, and apply had patched {opt_in.layers}"
        raise PadfreeError(_message(model, problem, replaced(model)))
    opt_in.answered = reached


def drops_layers(model: nn.Module) -> bool:
    """Whether a model leaves out layers at random while it is trained, as BART's kin does if its config says so."""
    if not model.training:
        return False
    config = getattr(model, "config", None)
    chances = {**vars(config or model), **vars(model)}
    return any(name.endswith("layerdrop") and isinstance(n, (int, float)) and n > 0 for name, n in chances.items())


def _silent(answers: Answers, layers: list[list[nn.Module]]) -> list[nn.Module]:
    """Returns the patched attention modules of the layers, of those that a decoder runs, that have not answered."""
    run = layers[: getattr(answers.model.config, "num_hidden_layers", None)]  # no more, from 4.48 on
    if answers.by_graphs and answers.by_graphs + len(answers.modules) >= len(run):
        return []
    return [each for layer in run if answers.modules.isdisjoint(layer) for each in layer]


def _layers(model: nn.Module) -> list[list[nn.Module]]:
    opt_in = OptIn.of(model)
    patch = registry().get(opt_in.model_type) if opt_in is not None and not opt_in.way else None
    return patched_layers(model, patch) if patch is not None and patch.is_decoder(model) else []


def patched_layers(decoder: nn.Module, patch: Patch) -> list[list[nn.Module]]:
    """Returns the patched attention modules of each layer of a decoder that has any.

    Of the copies that PEFT keeps of a module (`modules_to_save`), one answers for its layer.
    """
    parts = [
        part
        for child in decoder.children()
        for part in (child.children() if isinstance(child, nn.ModuleList) else (child,))
    ]
    layers = [_patched_attention(part, patch) for part in parts]
    return [layer for layer in layers if layer]


def _patched_attention(part: nn.Module, patch: Patch) -> list[nn.Module]:
    """Returns the patched attention modules in a module. Not by `modules()`, which takes thrice as long."""
    found, rest = [], [part]
    for module in rest:
        if ATTRIBUTE in vars(module) and patch.is_attention(module):
            found.append(module)
        else:
            rest += [child for child in module._modules.values() if child is not None]
    return found


def replaced(model: nn.Module) -> list[str]:
    """Names what somebody has put in the place of our wrappers since `apply`, and where."""
    opt_ins = {name: (module, opt_in) for name, module in model.named_modules() if (opt_in := OptIn.of(module))}
    seams = {seam for _, opt_in in opt_ins.values() for seam in opt_in.seams}
    found = {str(seam): there for seam in seams if (there := seam.replacement()) is not None}
    for name, (module, _) in opt_ins.items():
        own = vars(module).get("forward")
        if own is not None and not is_wrapper(own):
            found[f"{name or type(module).__name__}.forward"] = own
    return [f"{place} (now {_described(there)})" for place, there in sorted(found.items(), key=lambda each: each[0])]


def _described(there: object) -> str:
    name = getattr(there, "__qualname__", None)
    return f"{there.__module__}.{name}" if name else repr(there)


def _message(model: nn.Module, problem: str, found: list[str]) -> str:
    if len(found) > 3:
        found = [*found[:3], "..."]
    what = f"replaced since apply: {', '.join(found)}" if found else "something on the way to them was replaced"
    return (
        f"{type(model).__name__}: the packed call {problem}; {what}. Take that back, or call "
        "padfree_patch.apply(model) again after it, which patches and checks what is there then"
    )


def check_head_not_passed_by(decoder: nn.Module) -> None:
    """Raises PadfreeError if the patched model around a decoder runs now, but with a forward that is not ours.

    Labels at boundaries would be trained. Looks at the frames that run, because a decoder may well be called alone.
    """
    outer = under_way.answers
    if outer is not None and getattr(outer.model, "base_model", None) is decoder:
        return
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        head = _runs_forward_of(frame)
        if head is not None and head is not decoder and getattr(head, "base_model", None) is decoder:
            raise PadfreeError(
                f"{type(head).__name__}.forward was replaced by {_described(head.forward)} after apply, and was called "
                "past padfree_patch, which must see the labels of a packed row. Replace the forward of the class "
                "before padfree_patch.apply(model), or leave it as it is"
            )
        frame = frame.f_back


def _runs_forward_of(frame: types.FrameType) -> PreTrainedModel | None:
    """Returns the patched transformers model whose forward a frame runs; None if it runs something else."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(first, nn.Module) or OptIn.of(first) is None or not is_transformers_model(first):
        return None
    function: Function | None = first.forward
    while function is not None and not is_wrapper(function):
        function = getattr(function, "__func__", getattr(function, "func", function))
        if getattr(function, "__code__", None) is code:
            return first
        function = getattr(function, "__wrapped__", None)
    return None
