"""GLM-4 (0414): half of each head rotated, in interleaved pairs, and norms around attention and MLP.

Needs nothing of its own.

Read against models/glm4/modeling_glm4.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="glm4",
    attention="Glm4Attention",
    decoder="Glm4Model",
    transformers=">=4.51,<5.25",
    tiny={"head_dim": 16},
    variants={"biases": {"attention_bias": True}},
)
