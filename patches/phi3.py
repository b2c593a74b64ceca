"""Phi-3: fused q, k, v; a sliding window; and rotaries (su, yarn, longrope) that choose their factors by length.

Needs nothing of its own: `padfree_patch.rope` gives every sequence the factors of its own length.

Read against models/phi3/modeling_phi3.py of transformers 4.41.2, 4.43.4, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch.registry import Patch

PATCH = Patch(
    model_type="phi3",
    attention="Phi3Attention",
    decoder="Phi3Model",
    transformers=">=4.41,<5.24",
    tiny={"resid_pdrop": 0.0},
    variants={"window": {"sliding_window": 4}},
)
