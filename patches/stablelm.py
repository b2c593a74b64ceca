"""StableLM: partial rotary, optional norms of q and k per head, attention and MLP in parallel.

Needs nothing of its own. The sdpa class exists since 4.39.

Read against models/stablelm/modeling_stablelm.py of transformers 4.38.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="stablelm",
    attention="StableLmAttention",
    decoder="StableLmModel",
    transformers=">=4.38,<5.25",
    variants={
        "norms of q and k": {"qk_layernorm": True},
        "parallel": {"use_parallel_residual": True},
        "biases": {"use_qkv_bias": True},
        "one key head": {"num_key_value_heads": 1},
        "dynamic rope": {
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 8,
            "partial_rotary_factor": 1.0,
        },
    },
)
