"""Qwen3-Next: gated attention on every fourth layer, a gated delta rule, which carries a state, on the others.

The state would run from one example into the next, so such a layer runs on each sequence, or once with kernels that are
told where sequences begin.

Read against models/qwen3_next/modeling_qwen3_next.py of transformers 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="qwen3_next",
    attention="Qwen3NextAttention",
    decoder="Qwen3NextModel",
    transformers=">=4.57,<5.25",
    tiny={
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
    any_decoder=True,
)
