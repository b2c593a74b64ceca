"""Qwen3: Llama with a norm on queries and keys of each head, a head size of its own and windows on later layers.

Needs nothing of its own.

Read against models/qwen3/modeling_qwen3.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="qwen3",
    attention="Qwen3Attention",
    decoder="Qwen3Model",
    transformers=">=4.51,<5.25",
    tiny={"head_dim": 16},
    variants={
        "window on some layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "biases": {"attention_bias": True},
    },
)
