"""Mistral: Llama with a sliding window, whose effective size differs by version and by implementation.

Needs nothing of its own: the window is read off the mask that upstream itself would build
(`padfree_patch.seams.window`).
The sdpa class exists since 4.37; 4.36 has eager only.

Read against models/mistral/modeling_mistral.py of transformers 4.34.1, 4.36.2, 4.41.2, 4.43.4, 4.47.1, 4.57.6 and
5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="mistral",
    attention="MistralAttention",
    decoder="MistralModel",
    transformers=">=4.34,<5.25",
    variants={
        "window": {"sliding_window": 4},
        "no window": {"sliding_window": None},
        "one key head": {"num_key_value_heads": 1},
        "head size of its own": {"head_dim": 16},
    },
)
