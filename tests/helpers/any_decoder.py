"""Tiny models of architectures of each kind of difficulty, for tests without their patches."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from padfree_patch.testing import TINY

_SMALL = {**TINY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"max_position_embeddings": 128, "tie_word_embeddings": False}
_HEADS_OF_8 = {**_SMALL, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MIXED = ["linear_attention", "full_attention"]
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_COMMON = {name: _SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": _HEADS_OF_8,
    "qwen3_next": {
        **_HEADS_OF_8, **_EXPERTS, "layer_types": _MIXED, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4, "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 16,
    },
    "mamba": {**_SMALL, "state_size": 4, "time_step_rank": 4},
    "mamba2": {**_HEADS_OF_8, "state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "lfm2": {**_SMALL, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "gpt_oss": {**_HEADS_OF_8, **_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {**_HEADS_OF_8, **_WINDOWED},
    "deepseek_v3": {
        **_HEADS_OF_8, **_EXPERTS, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "llama4_text": {
        **_HEADS_OF_8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        "floor_scale": 4,
    },
    "rwkv": {**_COMMON, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "bart": {
        **_COMMON, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "encoder_layers": 2, "is_decoder": True, "is_encoder_decoder": False, "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "gpt2": {
        **_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}  # fmt: skip


def tiny_decoder(model_type: str, implementation: str | None = None, **config: object) -> Any:
    """Makes the same causal language model on every call, without trivial weights, in eval mode.

    Skips the test if this version has none.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"no {model_type} in this version of transformers")
    built = AutoConfig.for_model(model_type, **copy.deepcopy({**CONFIGS.get(model_type, {}), **config}))
    built.is_encoder_decoder = False
    chosen = {} if implementation is None else {"attn_implementation": implementation}
    return with_weights(lambda: AutoModelForCausalLM.from_config(built, **chosen))


def with_weights(make: Any, seed: int = 0) -> Any:
    """Returns the module that is made, in eval mode, with random weights where upstream's are all zeros or ones too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0) + torch.randn(parameter.shape) * 0.05)
    return model


def maker(model_type: str, implementation: str | None = None, **config: object):
    """Returns a function without arguments that makes the model."""
    return functools.partial(tiny_decoder, model_type, implementation, **config)
