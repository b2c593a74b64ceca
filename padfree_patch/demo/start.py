"""Makes or loads the model that both runs start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PadfreeError
from ..models import saved_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 2048


def make_small_llama(folder: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
    """Saves a Llama of 4 layers with random weights, about 4 million parameters, together with its tokenizer."""
    import transformers

    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_config(name: str | os.PathLike[str], *, layers: int | None) -> PretrainedConfig:
    """Loads the config of a model, cut to its first `layers` layers, and without dropout, which would differ per run.

    Raises PadfreeError if the model has fewer layers.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise PadfreeError(f"--layers {layers}: the model has {config.num_hidden_layers} layers")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):  # one entry per layer, since transformers 4.53
            config.layer_types = config.layer_types[:layers]
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
            setattr(config, key, 0.0)
    return config


def check_language_model(name: str | os.PathLike[str]) -> None:
    """Raises PadfreeError for a model of another kind: loaded as a language model, it would get a random head."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls = saved_class(transformers.AutoConfig.from_pretrained(name))
    if cls is not None and cls.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise PadfreeError(f"--model {str(name)!r}: it is a {cls.__name__}, the demo trains causal language models")


def load_model(name: str | os.PathLike[str], *, layers: int | None) -> PreTrainedModel:
    """Loads the model in float32, with whichever attention implementation transformers picks."""
    import transformers

    config = load_config(name, layers=layers)
    return transformers.AutoModelForCausalLM.from_pretrained(name, config=config).float()
