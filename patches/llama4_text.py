"""Llama 4, its language model: attention in chunks, layers without rotary, whose queries grow with the token's place.

That place is counted over the row, so such a layer's attention runs on each sequence.

4.54 and 4.55 are refused on eager and sdpa: unpatched and alone, an example's first tokens change with later ones.

Read against models/llama4/modeling_llama4.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="llama4_text",
    attention="Llama4TextAttention",
    decoder="Llama4TextModel",
    transformers=">=4.53,<5.25",
    tiny={
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0, 1],
        "floor_scale": 4,
    },
    any_decoder=True,
)
