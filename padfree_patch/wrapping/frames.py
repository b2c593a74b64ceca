"""What torch.compile makes of our functions: it compiles frames, and upstream's forward is to be the outermost one.

A wrapper of ours that it compiled as a frame of its own would be cut in two where the batch is read, and so would
every frame around it. Like `nn.Module.__call__`, our wrappers are therefore run as they are, and the frames that they
call are compiled. Where another frame calls a wrapper, it is traced with that frame.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ..upstream import Function

_frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
"""Private to PyTorch. Of a version without what is looked up here, the graphs are as many as there are breaks."""
_STRATEGIES = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")

is_tracing: Callable[[], bool] = getattr(torch.compiler, "is_compiling", bool)
"""Whether torch.compile, or torch.export, traces the code that asks."""

_callback: Callable[[], object] = getattr(_frames, "get_eval_frame_callback", lambda: None)

Marked = TypeVar("Marked", bound=Function)
Value = TypeVar("Value")


def runs_uncompiled(function: Marked) -> Marked:
    """Marks the code of a function: torch.compile makes no frame of its own of it, but of those that it calls."""
    if all(hasattr(_frames, name) for name in _STRATEGIES):  # torch 2.8 on
        strategy = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
        _frames.set_code_exec_strategy(function.__code__, strategy)
    elif hasattr(_frames, "skip_code"):
        _frames.skip_code(function.__code__)
    return function


@runs_uncompiled
def frames_are_compiled() -> bool:
    """Whether torch.compile is at work on what is called from here. False in a function that is kept from it."""
    return _callback() not in (None, False)


def graph_is_made() -> bool:
    """Whether torch.compile makes a graph in this thread, for which it will look again at the functions it has seen."""
    context = getattr(getattr(torch, "_guards", None), "CompileContext", None)
    return context is not None and context.try_get() is not None


@torch.compiler.disable
def _disabled(function: Callable[..., Value], *args: object) -> Value:
    return function(*args)


@runs_uncompiled
def outside_graphs(function: Callable[..., Value], *args: object) -> Value:
    """Calls a function of which torch.compile sees no frame: it refuses some, generators for one, with fullgraph."""
    return _disabled(function, *args) if _callback() not in (None, False) else function(*args)


class Outside:
    """Enters and leaves a context so that torch.compile sees no frame of it, but those of what runs inside."""

    @runs_uncompiled
    def __init__(self, make: Callable[..., AbstractContextManager[object]], *args: object):
        self._context = outside_graphs(make, *args)

    @runs_uncompiled
    def __enter__(self) -> object:
        return outside_graphs(self._context.__enter__)

    @runs_uncompiled
    def __exit__(self, *exception: Any) -> bool | None:
        return outside_graphs(self._context.__exit__, *exception)
