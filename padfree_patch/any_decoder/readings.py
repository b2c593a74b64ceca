"""What upstream's code reads of a config or a module: which numbers decide, without knowing what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PLAIN = (bool, int, float, str, torch.dtype)


class ReadConfig:
    """Stands for a config, notes the numbers that are read of it, and answers some of them otherwise."""

    _config: PretrainedConfig
    _instead: dict[str, int]
    _numbers: dict[str, int]
    _unclear: set[str]

    def __init__(self, config: PretrainedConfig, instead: dict[str, int], numbers: dict[str, int], unclear: set[str]):
        """Takes the config, other values for its numbers, and where to note numbers, and values that hold some."""
        vars(self).update(_config=config, _instead=instead, _numbers=numbers, _unclear=unclear)

    def __getattr__(self, name: str) -> object:
        value = getattr(self._config, name)
        if name == "get_text_config":
            return lambda *args, **kwargs: self._same(value(*args, **kwargs))
        if hasattr(value, "to_dict"):
            return self._same(value)
        if type(value) is int:
            self._numbers[name] = value
            return self._instead.get(name, value)
        if _holds_numbers(value):
            self._unclear.add(name)
        return value

    def _same(self, config: PretrainedConfig) -> ReadConfig:
        return ReadConfig(config, self._instead, self._numbers, self._unclear)


def _holds_numbers(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(type(each) is int or _holds_numbers(each) for each in values)


def facts_of(values: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Returns plain values by name, those of configs and modules inside them too, to tell two sets of values apart."""
    found = []
    for name, value in values.items():
        if hasattr(value, "to_dict") or isinstance(value, nn.Module):
            inside = {n: v for n, v in vars(value).items() if n[0] != "_" or n.startswith("_attn_impl")}
            found += [(f"{name}.{inner}", fact) for inner, fact in facts_of(inside)]
        elif value is None or isinstance(value, _PLAIN) or _is_list(value):
            found.append((name, str(value)))
    return tuple(sorted(found))


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(each is None or isinstance(each, _PLAIN) for each in value)


def without_weights(module: nn.Module) -> nn.Module:
    """Returns a module of the same class with the same config and plain values, and one empty parameter.

    Its dtype and device are the module's. What holds it does not keep the module alive.
    """
    husk: nn.Module = object.__new__(type(module))
    nn.Module.__init__(husk)
    plain = {name: v for name, v in vars(module).items() if name == "config" or v is None or isinstance(v, _PLAIN)}
    vars(husk).update(plain)
    some = next(module.parameters(), None)
    if some is not None:
        husk.register_parameter("some", nn.Parameter(some.detach().new_empty(0), requires_grad=False))
    return husk
