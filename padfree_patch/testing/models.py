"""Makes tiny models of every supported architecture, and random examples for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import versions
from ..batch.labels import IGNORED_LABEL
from ..registry import Patch
from ..upstream import Arguments
from .stored import Stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TINY: dict[str, int] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Config values that most decoders share; a patch overrides them with its `tiny`."""


MOST_STORED = 64
_STORED: dict[tuple[str, object], Stored[PreTrainedModel]] = {}
"""What was made last: upstream takes ten times as long to initialise a model, and tests ask for the same many times."""


class Unavailable(Exception):
    """Upstream itself has no such model, in this version or with this attention implementation."""


class UpstreamFails(Unavailable):
    """Upstream has it, but can't build it."""


def tiny_model(patch: Patch, implementation: str = "sdpa", *, seed: int = 0, **config: object) -> PreTrainedModel:
    """Makes a randomly initialised causal language model, in eval mode, float32, on the CPU.

    Args:
        patch: whose architecture.
        implementation: "eager", "sdpa" or "flash_attention_2", as in from_pretrained's `attn_implementation`.
        seed: of the weights; the same seed gives the same model.
        config: values on top of the patch's `tiny`.

    Raises Unavailable if upstream has no such model here, UpstreamFails if it fails to build it.
    """
    values = {**TINY, **patch.tiny, **config}
    here = torch.get_default_dtype(), torch.empty(0).device, versions.transformers_version()
    key = repr((patch.model_type, implementation, seed, sorted(values.items()), here)), _maker()
    if key not in _STORED:
        model = _initialised(_config(patch, values), patch.model_type, implementation, seed)
        if any(module._forward_pre_hooks for module in model.modules()):
            return model  # made while an autopatch was open, which has patched it
        _STORED[key] = Stored(model)
        if len(_STORED) > MOST_STORED:
            del _STORED[next(iter(_STORED))]
    return _STORED[key]()


def _maker() -> object:
    """Returns upstream's function that makes models, or what somebody has put in its place, as autopatch does."""
    from transformers import PreTrainedModel

    return vars(PreTrainedModel)["_from_config"]


def _initialised(config: PretrainedConfig, model_type: str, implementation: str, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if versions.transformers("<4.36"):
            if implementation == "sdpa":
                raise Unavailable(f"transformers {versions.transformers_version()} has no sdpa attention")
            config._flash_attn_2_enabled = implementation == "flash_attention_2"
            return AutoModelForCausalLM.from_config(config).eval()
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        except Exception as error:  # upstream's own
            kind = Unavailable if "does not support" in str(error) else UpstreamFails
            raise kind(f"{model_type} can't be loaded as {implementation}: {error!r}") from error


def _config(patch: Patch, values: Arguments) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    if patch.model_type not in CONFIG_MAPPING:
        raise Unavailable(f"transformers {versions.transformers_version()} has no {patch.model_type}")
    scaling = values.get("rope_scaling") or {}
    forms = [scaling]
    if "rope_type" in scaling:  # as it was called before 4.43, and in some configs before 4.45
        forms.append({"type": scaling["rope_type"], "factor": scaling["factor"]})
    if versions.transformers("<4.43"):
        forms.reverse()
    errors = []
    for form in forms:
        given = {**values, "rope_scaling": form} if form else values
        try:
            return AutoConfig.for_model(
                patch.model_type, **{name: _copy_if_dict(value) for name, value in given.items()}
            )
        except Exception as error:  # upstream's own: a ValueError for what it does not know, others for its faults
            errors.append(error)
    kind = Unavailable if isinstance(errors[0], ValueError) else UpstreamFails
    raise kind(f"{patch.model_type} has no such config: {errors[0]!r}") from errors[0]


def examples(lengths: Sequence[int], *, seed: int = 1, vocab_size: int = TINY["vocab_size"]) -> list[Tensor]:
    """Makes random token ids, int64 (1, length) each, without the special tokens 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (1, length), generator=generator) for length in lengths]


def pack(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Puts examples (1, length) end to end: input_ids and restarting position_ids, (1, T) each."""
    positions = [torch.arange(each.shape[1]).unsqueeze(0) for each in sequences]
    return {"input_ids": torch.cat(list(sequences), dim=1), "position_ids": torch.cat(positions, dim=1)}


def pad(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pads examples (1, length) on the right: input_ids, attention_mask and labels, (B, longest) each."""
    longest = max(each.shape[1] for each in sequences)
    ids, mask = (torch.zeros(len(sequences), longest, dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, each in enumerate(sequences):
        length = each.shape[1]
        ids[row, :length] = labels[row, :length] = each
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def checkpointing(*, reentrant: bool) -> Callable[[PreTrainedModel], None]:
    """Returns a function that switches gradient checkpointing on in a model, of the given kind, on any version."""

    def switch_on(model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.gradient_checkpointing_enable).parameters
        takes_kind = "gradient_checkpointing_kwargs" in parameters  # 4.35 on
        kind = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if takes_kind else {}
        model.gradient_checkpointing_enable(**kind)
        if reentrant:
            model.enable_input_require_grads()

    return switch_on


def _copy_if_dict(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value  # upstream writes into the rope_scaling it is given
