"""Phi 1, 1.5 and 2: partial rotary, optional norms of q and k, one norm for attention and MLP.

Needs nothing of its own. The sdpa class exists since 4.39.

Read against models/phi/modeling_phi.py of transformers 4.36.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="phi",
    attention="PhiAttention",
    decoder="PhiModel",
    transformers=">=4.36,<5.25",
    tiny={"resid_pdrop": 0.0},
    variants={
        "all key heads": {"num_key_value_heads": 6},
        "rotary on all of a head": {"partial_rotary_factor": 1.0},
        "norms of q and k": {"qk_layernorm": True},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
