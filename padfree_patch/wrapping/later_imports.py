"""Says when modules that nobody has imported yet are imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class Watch(importlib.abc.MetaPathFinder):
    """Calls a function with the name of each watched module, as soon as it was executed. Finds nothing itself.

    It is in `sys.meta_path` only while there is something to watch.
    """

    def __init__(self, imported: Callable[[str], None]):
        self._imported, self._names = imported, frozenset[str]()

    def only(self, names: frozenset[str]) -> None:
        """Watches these modules from now on."""
        self._names = names
        if names and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not names and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._names:
            return None
        others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        spec = next((spec for each in others if (spec := each.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._listen_to(spec.loader)
        return spec

    def _listen_to(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            del loader.exec_module
            execute(module)
            self._imported(module.__name__)

        loader.exec_module = exec_module


def when_imported(name: str, then: Callable[[types.ModuleType], None]) -> None:
    """Calls a function with a module once it was executed: now if it is imported, or as soon as somebody imports it.

    What the function raises, that import raises. wrapt's import hooks wait for it; its one finder then stays in
    `sys.meta_path`, and passes on every name that nobody waits for.
    """
    from wrapt import register_post_import_hook

    register_post_import_hook(then, name)
