"""PEFT's adapters in a model, and which of them can't serve a packed row. PEFT itself is never imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sized

from torch import Tensor, nn

from .errors import PadfreeError
from .upstream import Arguments

Adapters = tuple[tuple[str, object], ...]
"""Name and config of every active adapter."""

_PER_BATCH = {
    "LILY": "weighs its experts by their mean over all tokens of a batch, so that examples mix in padded batches too; "
    "train it on batches of one example",
}
"""PEFT methods that mix whatever stands in one batch, padded or packed: how, and what to do."""

_ON_PADDED = "train it on padded batches"


def active_configs(module: nn.Module) -> dict[str, object]:
    """Returns the configs of the adapters that are active in a PEFT model, or in a model with adapters, by name.

    Those that are disabled or merged are not.
    """
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    layer = _first_layer(module)
    if getattr(layer, "disable_adapters", False) is True or getattr(layer, "merged", False) is True:
        return {}
    active = getattr(module, "active_adapter", None)  # of a PEFT model; a transformers model has a method of that name
    if not isinstance(active, (str, list)):
        active = getattr(layer, "active_adapters", None)
    names = [active] if isinstance(active, str) else active if isinstance(active, list) else []
    return {name: configs[name] for name in names if name in configs}


def _first_layer(module: nn.Module) -> nn.Module | None:
    """Returns the first layer with adapters, which are the same in all; None, if they were all taken out again."""
    return next((each for each in module.modules() if "base_layer" in each._modules), None)


def adapters_of(module: nn.Module) -> Adapters:
    """Returns what tells the active adapters of a module from others; empty without any."""
    return tuple(active_configs(module).items())


def are_same(some: Adapters, others: Adapters) -> bool:
    """Whether adapters are the very same. One that came later under the same name has another config."""
    return len(some) == len(others) and all(a == b and one is two for (a, one), (b, two) in zip(some, others))


def needs_task_ids(model: nn.Module) -> bool:
    """Whether an active adapter asks for the number of a task for each row (Poly)."""
    return any(_method(config) == "POLY" for module in model.modules() for _, config in adapters_of(module))


def is_told_rows(arguments: Arguments) -> bool:
    """Whether a call of a PEFT model says something of each row of its batch: an adapter's name, or a task."""
    return any(arguments.get(name) is not None for name in _OF_ROWS)


def works_by_row(module: nn.Module) -> bool:
    """Whether an active adapter looks at the rows of a batch, and not only at what the decoder makes of them."""
    configs = active_configs(module).values()
    return any(
        _method(each) in ("SHADOW", "XLORA")
        or (_what_it_does_to_rows(each) is not None and not getattr(each, "is_prompt_learning", False))
        for each in configs
    )


def check_what_rows_are_told(module: nn.Module, arguments: Arguments, rows: int, examples: int) -> None:
    """Raises PadfreeError unless a call of a PEFT model gives each row of a packed batch one adapter, or one task."""
    who = type(module).__name__
    names = arguments.get("adapter_names")
    if names is not None and (problem := _problem_of_names(module, names)):
        raise PadfreeError(f"{who} {problem}")
    for argument, what in _OF_ROWS.items():
        given = arguments.get(argument)
        count = given.numel() if isinstance(given, Tensor) else len(given) if isinstance(given, Sized) else rows
        if count != rows:
            raise PadfreeError(
                f"{who}: {argument} has {count} value(s), the packed batch {rows} row(s) of {examples} examples; "
                f"PEFT has one {what} for all tokens of a row: put only examples that share one into a row, and give a "
                "value for each row"
            )


_OF_ROWS = {"adapter_names": "adapter", "task_ids": "task"}
"""Arguments of PEFT's models that have a value for each row of a batch, and what it is."""

_TAKE_NAMES = ("LORA", "ROAD", "GLORA")
"""PEFT methods that give each row the adapter that `adapter_names` has for it, in some version; others ignore it."""


def _problem_of_names(module: nn.Module, names: object) -> str | None:
    """Says why the adapters that a call names can't be those of packed rows; None if they can."""
    configs: Mapping[str, object] = getattr(module, "peft_config", {})
    kinds = ", ".join(sorted({type(each).__name__ for each in configs.values()}))
    heeded = hasattr(type(getattr(module, "base_model", None)), "_enable_peft_forward_hooks")  # PEFT 0.11 on
    if not heeded or any(_method(each) not in _TAKE_NAMES for each in configs.values()):
        return f"{kinds and f'with {kinds} '}ignores adapter_names, in this version at least; call set_adapter instead"
    if not isinstance(names, (list, tuple)):
        return f"takes adapter_names as a list with a name for each row, not {names!r}"
    if unknown := [name for name in names if name not in (*configs, "__base__")]:
        return f"has no adapter {unknown[0]!r}, which adapter_names gives a row; it has {', '.join(configs)}"
    reasons = (_what_it_does_to_rows(configs[name]) for name in names if name in configs)
    return next((f"with {kinds} {reason}" for reason in reasons if reason), None)


def takes_labels_past_the_head(module: nn.Module) -> bool:
    """Whether an active adapter has a loss of its own (Shadow), or calls the forward that the head had before apply."""
    return any(_method(config) in ("SHADOW", "ADAPTION_PROMPT") for config in active_configs(module).values())


def why_not_packed(model: nn.Module) -> str | None:
    """Says which active adapter in a model can't serve a packed row, why, and what to do; None if each can."""
    reasons = (why_own_not_packed(module, adapters_of(module)) for module in model.modules())
    return next((reason for reason in reasons if reason), None)


def why_own_not_packed(module: nn.Module, adapters: Adapters) -> str | None:
    """Says the same of a module's own active adapters."""
    for _, config in adapters:
        if what := _what_it_does_to_rows(config):
            return f"{type(module).__name__} with {type(config).__name__} {what}"
    return None


def check_adapters(model: nn.Module) -> None:
    """Raises PadfreeError if an active adapter in a model can't serve a packed row."""
    if reason := why_not_packed(model):
        raise PadfreeError(reason)


def _method(config: object) -> str:
    """Returns PEFT's name of a config's method."""
    method = getattr(config, "peft_type", None)
    return str(getattr(method, "value", method))


def _what_it_does_to_rows(config: object) -> str | None:
    if getattr(config, "is_prompt_learning", False):
        return (
            "puts virtual tokens before each row, where only the first example of a packed row could see them; "
            + _ON_PADDED
        )
    if getattr(config, "alora_invocation_tokens", None):
        return (
            "(activated LoRA) begins where a row has its invocation tokens for the last time, so that it would be off "
            f"in every example of a packed row but the last; {_ON_PADDED}"
        )
    if getattr(getattr(config, "velora_config", None), "init_type", "random") != "random":
        return (
            "(VeLoRA) estimates each example's gradients by the mean over all tokens of a batch, so that examples mix "
            "in padded batches too; give its VeloraConfig init_type='random'"
        )
    return _PER_BATCH.get(_method(config))
