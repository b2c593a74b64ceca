"""Gemma 2: windows on every other layer, and scores capped by a tanh.

Upstream's sdpa knows no cap. Before 4.53 a layer cuts its window out of the mask that it is handed, and before 4.48 the
cap is code of the attention module; so then the layer runs on each sequence.

Read against models/gemma2/modeling_gemma2.py of transformers 4.43.4, 4.48.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch, versions

PATCH = Patch(
    model_type="gemma2",
    attention="Gemma2Attention",
    decoder="Gemma2Model",
    transformers=">=4.42,<5.25",
    tiny={
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 1.0,
        "initializer_range": 0.2,  # larger scores, which the cap changes
    },
    any_decoder=versions.transformers("<4.53"),
)
