"""The transformers models inside a module, and what their configs say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .errors import PadfreeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def is_transformers_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def check_is_module(model: object) -> None:
    """Raises PadfreeError if a caller gives something else than a module."""
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"expected a transformers model, found {type(model).__name__}")


def pretrained_modules(model: nn.Module) -> list[PreTrainedModel]:
    """Returns the transformers models in a module, outermost first; looks through PEFT, DDP, FSDP, torch.compile."""
    return [module for module in model.modules() if is_transformers_model(module)]


def saved_class(config: PretrainedConfig | None) -> type[PreTrainedModel] | None:
    """Finds the class of transformers that a config says its weights were saved from; None if it names none here."""
    import transformers

    found = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    return next((cls for cls in found if cls is not None), None)


def implementation_of(config: PretrainedConfig) -> str:
    """Returns the attention implementation that a model of this config was loaded with."""
    if getattr(config, "_flash_attn_2_enabled", False):  # before 4.36
        return "flash_attention_2"
    return getattr(config, "_attn_implementation", None) or "eager"
