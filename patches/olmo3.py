"""OLMo 3: OLMo 2 with windows on three layers of four.

Needs nothing of its own.

Read against models/olmo3/modeling_olmo3.py of transformers 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="olmo3",
    attention="Olmo3Attention",
    decoder="Olmo3Model",
    transformers=">=4.57,<5.25",
    tiny={
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
)
