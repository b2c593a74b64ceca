"""Says when modules that nobody has imported yet are imported: wrapt's import hooks, which others' tools use too.

wrapt is imported when the first module is waited for. Its one finder then stays in `sys.meta_path`, and passes on every
name that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls a function with a module once it was executed: now if it is imported, or as soon as somebody imports it.

    What the function raises, that import raises.
    """
    from wrapt import register_post_import_hook

    register_post_import_hook(then, name)
