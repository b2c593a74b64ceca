"""What the values of a config become in a tiny model: rules by name, and by hand what they can't know."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97

RULES: list[tuple[str, int]] = [
    (r"(unpadded_)?vocab_size(_per_layer_input)?|num_embeddings|encoder_vocab_size|decoder_vocab_size", VOCABULARY),
    (r"hidden_size|d_model|n_embd|emb_dim|embed_dim|dim_model|embedding_size|model_dim|word_embed_proj_dim", 64),
    (r"cross_attention_hidden_size|lru_width|attention_hidden_size", 64),
    (r"hidden_size_per_layer_input|laurel_rank|altup_.*_dim|d_rel", 8),
    (r"num_attention_heads|n_heads?|num_heads|(decoder|encoder)_attention_heads|num_(de|en)coder_attention_heads", 4),
    (r"swa_num_attention_heads|attention_heads|encoder_heads|decoder_heads|attention_groups|num_groups", 4),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|swa_num_key_value_heads|num_ln_in_parallel_attn_", 2),
    (r"num_global_key_value_heads", 2),
    (r"head_dim|attention_head_dim|kv_channels|swa_head_dim|d_kv|dim_head|attention_head_size|global_head_dim", 16),
    (r"moe_intermediate_size|(moe_)?shared_expert_intermediate_size|expert_ffn_hidden_size|moe_latent_size", 24),
    (r"shared_intermediate_size|moe_ffn_hidden_size|moe_shared_intermediate_size", 24),
    (r"(.*_)?intermediate_size(_mlp)?|ffn_dim|(de|en)coder_ffn_dim|n_inner|ffn_hidden_size|d_ff|dim_ff|d_inner", 48),
    (r"feed_forward_size|ff_dim|block_ff_dim|linear_units|feedforward_dim|mlp_hidden_size|ffn_size", 48),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|top_k_experts|moe_top_?k|num_selected_experts|moe_k|num_experts_per_token|top_k", 2),
    (r"moe_num_active_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|num_expert_groups", 1),
    (r"moe_num_shared_experts|first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"q_lora_rank|o_lora_rank|qk_head_dim", 24),
    (r"kv_lora_rank|qk_nope_head_dim|index_head_dim", 16),
    (r"v_head_dim|swa_v_head_dim", 12),
    (r"qk_rope_head_dim|rotary_dim|rotary_ndims", 8),
    (r"index_n_heads", 2),
    (r"index_topk", 6),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention|swa_window|attention_chunk_size", 4),
    (r"swa_window_size", 4),
    (r"rel_extent", 128),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_state_dim|mamba_state_size|mamba_chunk_size|chunk_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_dt_rank|time_step_rank", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 32),
    (r"mamba_d_ssm", 128),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim|head_v_dim|linear_attn_head_dim", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_seq_length|max_target_positions|max_position", 128),
    (r"max_sequence_length|max_source_positions|seq_length|context_length|original_max_position_embeddings", 128),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|num_kv_shared_layers", 0),
]
"""The whole name of a config value, and the most that it becomes; the first that matches counts."""

LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|(de|en)coder_layers|num_((de|en)coder|decoder|encoder)_layers|num_blocks"
)
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "attention_types", "hybrid_override_pattern")
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DROP = object()
"""Stands for a value that the config works out by itself."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE_HALF = {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_XDROPE = {**_PLAIN_ROPE, "rope_type": "dynamic", "xdrope_section": [2, 2, 2, 2], "alpha": 1.0, "factor": 1.0}
_SPARSE = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 6}
_SPARSE["indexer_compress_ratio"] = 2
_MIXED = ["linear_attention", "full_attention"] * 2
_WINDOWED = ["sliding_attention", "full_attention"]
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32}
_SHARED_KEYS = {"layer_types": _WINDOWED * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
_EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}

BY_HAND: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "big_bird": {"attention_type": "original_full"},  # a short call makes it that, for good, so apply refuses the other
    "cohere_compass_text": {"layer_types": _WINDOWED * 2, "rope_parameters": dict.fromkeys(_WINDOWED, _PLAIN_ROPE)},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0, "top_k": DROP},
        "ffn_config": {
            "top_k": DROP,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 64,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "glm4v_moe_text": {"rope_parameters": _MROPE_HALF},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm5_next_text": {"index_kpool": 2, "index_topk": 6},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED, **_MAMBA},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": _XDROPE},
    "jamba": _EVERY_SECOND,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {
        "use_sliding_window": True,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
    },
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp": {"text_config": _SPARSE},
    "qwen4_exp_text": _SPARSE,
    "xlstm": {"chunk_size": 64, "v_head_dim": DROP, "qk_head_dim": DROP},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 4},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}
"""By model type, what the rules can't know."""

# fmt: off
IS_DECODER = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
    "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
)
# fmt: on
"""Model types that are causal only if their config says `is_decoder`."""
