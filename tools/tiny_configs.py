"""Tiny random models of every causal language model that the installed transformers knows.

The default config is shrunk by the names of its values. Every kind of layer stays, windows and chunks have 4 tokens,
and sparse attention keeps fewer tokens than the examples have, so that each of them does something.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from config_rules import BY_HAND, DROP, IS_DECODER, LAYER_KINDS, LAYERS, RULES, SPECIAL_TOKENS, VOCABULARY

DEEPEST = 3
"""Configs inside of configs that are shrunk."""


def small_values(config: Any, depth: int = 0) -> dict[str, Any]:
    """Returns the config values that make a model of the config's class small."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    total = max((value for name, value in values.items() if _is_layers(name, value)), default=0)
    kinds = _kinds_of_layers(values)
    layers = _layers_for(kinds)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if _is_config(value):
            if depth < DEEPEST:
                given[name] = small_values(value, depth + 1)
        elif _is_layers(name, value):
            given[name] = layers
        elif isinstance(value, (list, tuple)) and total and len(value) == total:
            given[name] = _short(list(value), kinds, layers)
        elif type(value) is int and name not in SPECIAL_TOKENS and (small := _small(name, value)) is not None:
            given[name] = small
    return given | _fitting(values, given)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _is_layers(name: str, value: Any) -> bool:
    return type(value) is int and re.fullmatch(LAYERS, name) is not None


def _kinds_of_layers(values: dict[str, Any]) -> list[str]:
    """Returns the different kinds of layers, in the order of their first; nothing if all are of one kind."""
    for name in LAYER_KINDS:
        value = values.get(name)
        if isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value):
            kinds = list(dict.fromkeys(value))
            return kinds if len(kinds) > 1 else []
    return []


def _layers_for(kinds: list[str]) -> int:
    """Returns a number of layers with two of each kind, if there are few kinds."""
    if not kinds:
        return 4
    return 2 * len(kinds) if len(kinds) < 4 else len(kinds) + 1


def _short(value: list[Any], kinds: list[str], layers: int) -> list[Any]:
    """Returns the list of something for each layer, for fewer layers, with all that is in it."""
    if kinds and all(isinstance(each, str) for each in value) and set(value) == set(kinds):
        if "full_attention" not in kinds:
            return (kinds * 3)[:layers]
        ordered = [*(kind for kind in kinds if kind != "full_attention"), "full_attention"]
        return (ordered * 3)[:layers] if layers % len(kinds) == 0 else [*(ordered * 3)[: layers - 1], "full_attention"]
    distinct = [each for place, each in enumerate(value) if each not in value[:place]]
    return (distinct * layers)[:layers] if len(distinct) <= layers else value[:layers]


def _small(name: str, value: int) -> int | None:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return value if value <= 0 else small if name.endswith("head_dim") else min(small, value)
    return None


def _fitting(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns values that follow from others: heads of keys, a head size, token ids within the vocabulary."""
    fitting: dict[str, Any] = {}
    heads = next((values[k] for k in ("num_attention_heads", "n_heads", "n_head") if type(values.get(k)) is int), None)
    of_keys = values.get("num_key_value_heads")
    if type(of_keys) is int and heads and of_keys >= heads and "num_key_value_heads" in given:
        fitting["num_key_value_heads"] = given.get("num_attention_heads", 4)
    if of_keys == 1:
        fitting["num_key_value_heads"] = 1
    if "qk_rope_head_dim" in given and "head_dim" in given:
        fitting["head_dim"] = given["qk_rope_head_dim"]
    if "vocab_size" in values:
        fitting |= SPECIAL_TOKENS
    for name, value in values.items():
        is_token = name.endswith(("_token_id", "_token_index")) and type(value) is int
        if is_token and name not in given and name not in fitting and value >= VOCABULARY:
            fitting[name] = 3
    return fitting


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = {name: value for name, value in base.items() if extra.get(name) is not DROP}
    for name, value in extra.items():
        if isinstance(value, dict):
            result[name] = _merged(result[name] if isinstance(result.get(name), dict) else {}, value)
        elif value is not DROP:
            result[name] = value
    return result


def tiny_config(model_type: str) -> Any:
    """Makes a small config of a model type. Raises what upstream raises if none of the forms that it may have fits."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    hand = BY_HAND.get(model_type, {})
    try:
        given = small_values(config_class())
    except Exception:  # upstream's own: it has no defaults
        if not hand:
            raise
        given = {}
    error: Exception | None = None
    for form in _forms(_merged(given, hand), hand):
        try:
            return config_class(**copy.deepcopy(form))
        except Exception as its_own:
            error = error or its_own
    assert error is not None
    raise error


def _forms(given: dict[str, Any], hand: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the values as the newest version takes them, then as older ones do."""
    yield given
    if "ffn_config" in given:  # DBRX of 4.x takes it from d_model
        given["ffn_config"].pop("hidden_size", None)
    older = {"linear_attention": "mamba", "full_attention": "attention"}
    yield {
        name: [older.get(each, each) if isinstance(each, str) else each for each in value]
        if isinstance(value, list)
        else value
        for name, value in given.items()
    }
    yield {name: value for name, value in given.items() if not isinstance(value, list) or name in hand}


def tiny_model(model_type: str, implementation: str, *, seed: int = 0) -> Any:
    """Makes a model with random weights, none of them trivial, in float32 and without dropout; "default" is upstream's.

    A model type that is no causal language model, but the text backbone of something, gives the backbone.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    config = tiny_config(model_type)
    for each in (config, *(value for value in vars(config).values() if _is_config(value))):
        if model_type in IS_DECODER and hasattr(each, "is_decoder"):
            each.is_decoder = True
    torch.manual_seed(seed)
    chosen = {} if implementation == "default" else {"attn_implementation": implementation}
    auto = AutoModelForCausalLM if model_type in causal_types() else AutoModel
    model = auto.from_config(config, **chosen).float()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0) + noise)
    _drop_nothing(model)
    return model.eval()


def _drop_nothing(model: nn.Module) -> None:
    """Sets every probability of dropout, and the noise of routers, to 0."""
    modules = list(model.modules())
    for holder in (*modules, *(each.config for each in modules if _is_config(getattr(each, "config", None)))):
        for name, value in vars(holder).items():
            if type(value) is float and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0


def causal_types() -> list[str]:
    """Returns the model types of the causal language models of this transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def all_types() -> list[str]:
    """Returns those, and the text backbones of multimodal models."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    backbones = {each for each in MODEL_MAPPING_NAMES if each.endswith("_text") and not each.endswith("_to_text")}
    return sorted(backbones.union(causal_types()))
