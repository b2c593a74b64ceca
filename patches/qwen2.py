"""Qwen2: Llama with biases on q, k and v and a sliding window that not every layer has.

Needs nothing of its own. Which layers are windowed depends on the version (`max_window_layers`, from 4.53 on
`layer_types`) and comes with the mask that upstream gives to each layer (`padfree_patch.seams.window`).

Read against models/qwen2/modeling_qwen2.py of transformers 4.41.2, 4.43.4, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="qwen2",
    attention="Qwen2Attention",
    decoder="Qwen2Model",
    transformers=">=4.37,<5.25",
    variants={
        "window on all layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "window on some layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "one key head": {"num_key_value_heads": 1},
        "window switched off": {"use_sliding_window": False, "sliding_window": 4},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
