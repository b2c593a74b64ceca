"""Falcon with rotary: three head layouts, old and new decoder, parallel or serial.

Needs nothing of its own. It adds its mask to eager's scores unasked (`kernel_call._Scores.__add__`). Falcon with ALiBi
is refused: its bias is part of a mask of T x T.

Read against models/falcon/modeling_falcon.py of transformers 4.35.2, 4.36.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from typing import Any

from padfree_patch.registry import Patch


def refusal(config: Any) -> str | None:
    """Why a Falcon of this configuration can't be patched, or None."""
    if config.alibi:
        return "its ALiBi bias is part of a T x T mask, in bfloat16, which no backend here takes; rotary Falcons work"
    return None


PATCH = Patch(
    model_type="falcon",
    attention="FalconAttention",
    decoder="FalconModel",
    transformers=">=4.35,<5.24",
    tiny={"num_kv_heads": 2, "new_decoder_architecture": True},
    refusal=refusal,
    variants={
        "one key head": {"new_decoder_architecture": False, "multi_query": True},
        "all key heads": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6},
        "serial": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    },
)
