"""Whose code a function is, under all that is wrapped around it."""

from __future__ import annotations

import functools
import types
from typing import Any

from ..wrapping.seam import original_of


def is_code_of(owners: tuple[str, ...], function: Any) -> bool:
    """Whether a function, and all that it wraps, is code of some packages: `functools.wraps` copies `__module__`.

    Args:
        owners: how the names of their modules begin, with a dot at the end.
        function: bound or not, or a callable object. Builtins are everybody's.

    >>> own = functools.wraps(functools.update_wrapper)(lambda: None)
    >>> own.__module__, is_code_of(("functools.",), own)
    ('functools', False)
    """
    while function is not None and not isinstance(function, types.BuiltinFunctionType):
        if isinstance(function, functools.partial):
            function = function.func
            continue
        code = getattr(function, "__globals__", None)
        name = type(function).__module__ if code is None else code.get("__name__")
        if not f"{name}.".startswith(owners):
            return False
        original = original_of(function)
        function = getattr(function, "__wrapped__", None) if original is function else original
    return True
