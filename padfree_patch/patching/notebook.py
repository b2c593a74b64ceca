"""In a notebook, a cell that ends with `padfree_patch.apply(model)` shows a line instead of the tree of modules."""

from __future__ import annotations

import sys
import weakref

from torch import nn


def show_line(model: nn.Module, line: str) -> None:
    """Lets IPython print a line if the cell that runs ends with the model; does nothing where no IPython runs."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)  # not there while IPython is being imported
    shell = None if get_shell is None else get_shell()
    if shell is None or shell.display_formatter is None:
        return
    formatter, kind, of_this_cell = shell.display_formatter.ipython_display_formatter, type(model), weakref.ref(model)
    if formatter.for_type(kind) is not None:  # somebody's own way of showing such a model
        return

    def show(shown: nn.Module) -> None:
        formatter.pop(kind, None)
        if shown is of_this_cell():
            print(line)
        else:
            sys.modules["IPython"].display.display(shown)
            formatter.for_type(kind, show)

    def end_of_cell(*_: object) -> None:
        shell.events.unregister("post_run_cell", end_of_cell)
        formatter.pop(kind, None)

    formatter.for_type(kind, show)
    shell.events.register("post_run_cell", end_of_cell)
