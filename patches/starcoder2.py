"""StarCoder2: biases, a sliding window, and a residual dropout after the output projection.

Needs nothing of its own. Gradient checkpointing is silently not applied by upstream in 4.48 to 4.51.

Read against models/starcoder2/modeling_starcoder2.py of transformers 4.39.3, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="starcoder2",
    attention="Starcoder2Attention",
    decoder="Starcoder2Model",
    transformers=">=4.39,<5.25",
    tiny={"residual_dropout": 0.0, "embedding_dropout": 0.0},
    variants={
        "window": {"sliding_window": 4},
        "no biases": {"use_bias": False},
        "one key head": {"num_key_value_heads": 1},
    },
)
