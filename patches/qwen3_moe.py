"""Qwen3-MoE: Qwen3 with routed experts.

Needs nothing of its own; on what experts do to rounding see `verification.rounding_of_neighbours`.

Read against models/qwen3_moe/modeling_qwen3_moe.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="qwen3_moe",
    attention="Qwen3MoeAttention",
    decoder="Qwen3MoeModel",
    transformers=">=4.51,<5.25",
    tiny={"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    variants={"dense layers between": {"decoder_sparse_step": 2}},
)
