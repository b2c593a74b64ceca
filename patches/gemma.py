"""Gemma: Llama with a head size of its own and scaled embeddings.

Needs nothing of its own.

Read against models/gemma/modeling_gemma.py of transformers 4.38.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="gemma",
    attention="GemmaAttention",
    decoder="GemmaModel",
    transformers=">=4.38,<5.25",
    tiny={"head_dim": 16},
    variants={"one key head": {"num_key_value_heads": 1}, "biases": {"attention_bias": True}},
)
