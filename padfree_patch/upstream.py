"""Types of what upstream's functions are given and return, where one version's own types would be wrong on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.modeling_outputs import ModelOutput

Arguments = dict[str, Any]
"""The arguments of a call by name. What each of them is depends on the function that is called, and its version."""

Function = Callable[..., Any]
"""A function of upstream, or of torch. Nothing is known of what it takes and returns until it is looked at."""

Outputs: TypeAlias = "ModelOutput | tuple[Tensor, ...]"
"""What a model returns: by name, or a tuple where the call or the config asks for one."""
