"""Mixtral: Mistral with a mixture of experts; both windows and leaks are Mistral's.

Needs nothing of its own. Routing is per token, so packing does not change it; how many tokens an expert multiplies at
once does depend on the neighbours, so B's logits move by rounding when A changes
(`verification.rounding_of_neighbours`).

Read against models/mixtral/modeling_mixtral.py of transformers 4.36.2, 4.41.2, 4.47.1, 4.57.6 and 5.23.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="mixtral",
    attention="MixtralAttention",
    decoder="MixtralModel",
    transformers=">=4.36,<5.25",
    tiny={"num_local_experts": 4},
    variants={"window": {"sliding_window": 4}, "no window": {"sliding_window": None}},
)
