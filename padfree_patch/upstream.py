"""Types of what upstream's functions are given, where one version's own types would be wrong on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
"""The arguments of a call by name. What each of them is depends on the function that is called, and its version."""

Function = Callable[..., Any]
"""A function of upstream, or of torch. Nothing is known of what it takes and returns until it is looked at."""
