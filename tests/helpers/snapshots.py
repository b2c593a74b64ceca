"""What `apply` could have changed of a model and of transformers."""

from __future__ import annotations

import sys


def snapshot(model) -> dict:
    """Returns the `vars` of every module, of their classes, and of the modeling file."""
    import transformers.models

    seen = {}
    for name, module in model.named_modules():
        seen[name] = dict(vars(module))
        for base in type(module).__mro__:
            seen[base] = dict(vars(base))
            if base.__module__.startswith(transformers.models.__name__):
                seen[base.__module__] = dict(vars(sys.modules[base.__module__]))
    return seen
