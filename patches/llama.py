"""Llama 1, 2 and 3. On eager and sdpa, upstream's default call mixes the examples of a packed row on every version.

Needs nothing of its own. Its dynamic-NTK rotary looks at the length of the row (4.36) or at the longest position in
it (4.38 and later) and never shrinks again; `padfree_patch.rope` gives every sequence its own.

Read against models/llama/modeling_llama.py of transformers 4.34.1, 4.36.2, 4.41.2, 4.43.4, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch.registry import Patch

PATCH = Patch(
    model_type="llama",
    attention="LlamaAttention",
    decoder="LlamaModel",
    transformers=">=4.34,<5.24",
    variants={
        "all key heads": {"num_key_value_heads": 6},
        "biases": {"attention_bias": True},
        "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
