"""OLMo: Llama with norms that have no weights, and q, k and v clipped in place.

Needs nothing of its own: the clipping comes before the kernel call, which is all that is replaced.

Read against models/olmo/modeling_olmo.py of transformers 4.40.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="olmo",
    attention="OlmoAttention",
    decoder="OlmoModel",
    transformers=">=4.40,<5.25",
    variants={
        "clipped": {"clip_qkv": 0.05},
        "one key head": {"num_key_value_heads": 1},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
