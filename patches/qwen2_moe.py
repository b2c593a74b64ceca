"""Qwen2-MoE: Qwen2 with routed and shared experts, one attention class per implementation until 4.57.

Needs nothing of its own; on what experts do to rounding see `verification.rounding_of_neighbours`.

Read against models/qwen2_moe/modeling_qwen2_moe.py of transformers 4.40.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="qwen2_moe",
    attention="Qwen2MoeAttention",
    decoder="Qwen2MoeModel",
    transformers=">=4.40,<5.25",
    tiny={
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    variants={
        "window on some layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "dense layers between": {"decoder_sparse_step": 2},
    },
)
