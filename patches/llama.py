"""Llama 1, 2 and 3. On eager and sdpa, upstream's default call mixes the examples of a packed row on every version.

Needs nothing of its own. Its dynamic-NTK rotary looks at the length of the row (4.36) or at the longest position in
it (4.38 and later) and never shrinks again; `padfree_patch.seams.rotary` gives every sequence its own.

Read against models/llama/modeling_llama.py of transformers 4.34.1, 4.36.2, 4.41.2, 4.43.4, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="llama",
    attention="LlamaAttention",
    decoder="LlamaModel",
    transformers=">=4.34,<5.25",
    variants={
        "all key heads": {"num_key_value_heads": 6},
        "one key head": {"num_key_value_heads": 1},
        "odd head size": {"hidden_size": 60},
        "biases": {"attention_bias": True},
        "sliced weights": {"pretraining_tp": 2, "vocab_size": 98},
        "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        "yarn rope": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 16},
        "llama3 rope": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "longrope": {
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0, 1.0, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 8,
            },
            "max_position_embeddings": 32,
        },
    },
)
