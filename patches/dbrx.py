"""DBRX: one fused and clipped projection, a mixture of experts, position_ids passed by position to its blocks.

Needs nothing of its own: the clipping comes before the kernel call, which is all that is replaced.

Read against models/dbrx/modeling_dbrx.py of transformers 4.40.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch, versions

_FFN = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
if versions.transformers(">=5"):
    _FFN["hidden_size"] = 48  # 5.0 to 5.14 do not take it from d_model; 4.x knows no such key

PATCH = Patch(
    model_type="dbrx",
    attention="DbrxAttention",
    decoder="DbrxModel",
    transformers=">=4.40,<5.25",
    tiny={
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": _FFN,
    },
    variants={"clipped hard": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0}}},
)
