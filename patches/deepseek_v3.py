"""DeepSeek V3 and R1: multi-head latent attention, whose values have another head size than queries and keys (MLA).

Flash kernels get values padded with zeros, which upstream pads as well (`padfree_patch.seams.kernel`).

Read against models/deepseek_v3/modeling_deepseek_v3.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="deepseek_v3",
    attention="DeepseekV3Attention",
    decoder="DeepseekV3Model",
    transformers=">=4.51,<5.25",
    tiny={
        "num_key_value_heads": 6,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    variants={"queries from the hidden state": {"q_lora_rank": None}},
)
