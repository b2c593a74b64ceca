"""PEFT's adapters in a model, and which of them can't serve a packed row. PEFT itself is never imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .errors import PadfreeError

Adapters = tuple[tuple[str, str], ...]
"""Name and class of the config of every active adapter."""

_PER_BATCH = {
    "LILY": "weighs its experts by their mean over all tokens of a batch, so that examples mix in padded batches too; "
    "train it on batches of one example",
}
"""PEFT methods that mix whatever stands in one batch, padded or packed: how, and what to do."""

_ON_PADDED = "train it on padded batches"


def active_configs(module: nn.Module) -> dict[str, object]:
    """Returns the configs of the adapters that are active in a PEFT model, or in a model with adapters, by name."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    active = getattr(module, "active_adapter", None)  # of a PEFT model; a transformers model has a method of that name
    if not isinstance(active, (str, list)):
        active = _active_in_layers(module)
    names = [active] if isinstance(active, str) else active
    return {name: configs[name] for name in names if name in configs}


def _active_in_layers(module: nn.Module) -> list[str]:
    """Returns which adapters the first layer with adapters uses; none, if they were all taken out again."""
    for each in module.modules():
        if hasattr(each, "base_layer") and isinstance(active := getattr(each, "active_adapters", None), list):
            return active
    return []


def adapters_of(module: nn.Module) -> Adapters:
    """Returns what tells the active adapters of a module from others; empty without any."""
    return tuple((name, type(config).__name__) for name, config in active_configs(module).items())


def needs_task_ids(model: nn.Module) -> bool:
    """Whether an active adapter asks for the number of a task for each row (Poly)."""
    return any(_method(config) == "POLY" for _, config in _all_active(model))


def takes_labels_past_the_head(module: nn.Module) -> bool:
    """Whether an active adapter has a loss of its own (Shadow), or calls the forward that the head had before apply."""
    return any(_method(config) in ("SHADOW", "ADAPTION_PROMPT") for config in active_configs(module).values())


def why_not_packed(model: nn.Module) -> str | None:
    """Says which active adapter in a model can't serve a packed row, why, and what to do; None if each can."""
    for module, config in _all_active(model):
        if what := _what_it_does_to_rows(config):
            return f"{type(module).__name__} with {type(config).__name__} {what}"
    return None


def check_adapters(model: nn.Module) -> None:
    """Raises PadfreeError if an active adapter in a model can't serve a packed row."""
    if reason := why_not_packed(model):
        raise PadfreeError(reason)


def _all_active(model: nn.Module) -> Iterator[tuple[nn.Module, object]]:
    for module in model.modules():
        for config in active_configs(module).values():
            yield module, config


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
