"""What `apply` could have changed of a model and of transformers."""

from __future__ import annotations

import sys


def snapshot(model) -> dict:
    """Returns the `vars` of every module, of their classes, and of the modeling file, and the attention functions."""
    import transformers.modeling_utils
    import transformers.models

    seen = {"attention functions": dict(getattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS", {}))}
    for name, module in model.named_modules():
        seen[name] = dict(vars(module))
        for base in type(module).__mro__:
            seen[base] = dict(vars(base))
            if base.__module__.startswith(transformers.models.__name__):
                seen[base.__module__] = dict(vars(sys.modules[base.__module__]))
    return seen
