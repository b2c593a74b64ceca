"""Phi-3: fused q, k, v; a sliding window; and rotaries (su, yarn, longrope) that choose their factors by length.

Needs nothing of its own: `padfree_patch.seams.rotary` gives every sequence the factors of its own length.

Read against models/phi3/modeling_phi3.py of transformers 4.41.2, 4.43.4, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch


def _two_ropes(kind: str) -> dict[str, object]:
    """Makes a config that rotates examples of more than eight tokens by other factors; every kind is longrope now."""
    factors = {"short_factor": [1.0, 1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    return {"rope_scaling": {"type": kind, **factors}, "original_max_position_embeddings": 8}


PATCH = Patch(
    model_type="phi3",
    attention="Phi3Attention",
    decoder="Phi3Model",
    transformers=">=4.41,<5.25",
    tiny={"resid_pdrop": 0.0},
    variants={
        "window": {"sliding_window": 4},
        "one key head": {"num_key_value_heads": 1},
        "rotary on half a head": {"partial_rotary_factor": 0.5},
        "su rope": _two_ropes("su"),
        "yarn rope": _two_ropes("yarn"),
    },
)
