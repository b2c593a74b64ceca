"""Granite: Llama with multipliers; the scale of its attention is `attention_multiplier`, which reaches the kernel call.

Needs nothing of its own.

Read against models/granite/modeling_granite.py of transformers 4.45.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="granite",
    attention="GraniteAttention",
    decoder="GraniteModel",
    transformers=">=4.45,<5.25",
    tiny={"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 1.5},
    variants={
        "biases": {"attention_bias": True},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
