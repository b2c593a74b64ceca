"""SmolLM3: Llama in which every fourth layer rotates nothing (NoPE).

Needs nothing of its own.

Read against models/smollm3/modeling_smollm3.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="smollm3",
    attention="SmolLM3Attention",
    decoder="SmolLM3Model",
    transformers=">=4.53,<5.25",
    tiny={"no_rope_layers": [1, 0, 1]},
    variants={
        "window on some layers": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    },
)
