"""GPT-OSS: a sink in each head, which takes a part of every softmax, windows on every other layer, and experts.

On the CPU a backend computes the sinks; elsewhere upstream's own attention function runs on each sequence.

Read against models/gpt_oss/modeling_gpt_oss.py of transformers 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="gpt_oss",
    attention="GptOssAttention",
    decoder="GptOssModel",
    transformers=">=4.55,<5.25",
    tiny={
        "intermediate_size": 32,  # 4.55 computes every expert for every token, which is no tensor of T x T
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    any_decoder=True,
)
