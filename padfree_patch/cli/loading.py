"""Loads the model that a command is given, as what it is, and tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PadfreeError
from ..foreign import check_there, explained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load(model: str, tiny: bool, attn: str | None) -> PreTrainedModel:
    """Loads a model of the class that it was saved from, or builds a tiny random one of a type that has a patch.

    Args:
        model: folder or name on the hub; with `tiny` the model type.
        tiny: whether to build one.
        attn: implementation as in from_pretrained's `attn_implementation`; None for what transformers chooses.

    Raises PadfreeError, of one line, if that fails.
    """
    return _tiny(model, attn) if tiny else _saved(model, attn)


def _tiny(model_type: str, attn: str | None) -> PreTrainedModel:
    from .. import versions
    from ..registry import registry
    from ..testing import tiny_model

    patch = registry().get(model_type)
    if patch is None:
        raise PadfreeError(f"no patch for {model_type!r}; there are {', '.join(registry().model_types())}")
    attn = attn or ("eager" if versions.transformers("<4.36") else "sdpa")
    with explained(f"no tiny {model_type} can be made for --attn {attn}"):
        return tiny_model(patch, attn)


def _saved(model: str, attn: str | None) -> PreTrainedModel:
    what = f"no model can be loaded from {model!r}" + (f" for --attn {attn}" if attn else "")
    check_there(model, what)
    from ..models import saved_class

    with explained(what):
        import transformers

        config = _config(model)
        cls = saved_class(config) or transformers.AutoModelForCausalLM
        return cls.from_pretrained(model, **_implementation(attn))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or a name on the hub.

    Raises PadfreeError, of one line, if that fails.
    """
    what = f"no tokenizer can be loaded from {name!r}"
    check_there(name, what)
    with explained(what):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)


def _config(model: str) -> PretrainedConfig | None:
    """Returns the config of a folder or name; None for adapters of PEFT, whose base model the auto classes load."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model)
    except OSError:
        from transformers.utils import find_adapter_config_file

        if find_adapter_config_file(model) is None:
            raise
        return None


def _implementation(attn: str | None) -> dict[str, object]:
    from .. import versions

    if attn is None or (attn == "eager" and versions.transformers("<4.36")):
        return {}
    if attn == "flash_attention_2" and versions.transformers("<4.36"):
        return {"use_flash_attention_2": True}
    return {"attn_implementation": attn}
