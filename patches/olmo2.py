"""OLMo 2: norms after attention and MLP, and on queries and keys over all heads at once.

Needs nothing of its own.

Read against models/olmo2/modeling_olmo2.py of transformers 4.48.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="olmo2",
    attention="Olmo2Attention",
    decoder="Olmo2Model",
    transformers=">=4.47,<5.25",
    variants={"all key heads": {"num_key_value_heads": 6}},
)
