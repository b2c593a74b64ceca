"""Persimmon: one projection for q, k and v, layer norms on q and k, partial rotary.

Upstream mixes the examples of a packed row on every version below, as it does for Llama. Persimmon needs nothing of
its own: the projection, the norms and the rotary come before the kernel call, and only that call is replaced.
Persimmon can be loaded as sdpa since 4.53; before, it has eager attention only.

Read against models/persimmon/modeling_persimmon.py of transformers 4.36.2, 4.41.2, 4.43.4, 4.47.1, 4.57.6, 5.23.0 and
5.24.0.
"""

from padfree_patch import Patch

PATCH = Patch(
    model_type="persimmon",
    attention="PersimmonAttention",
    decoder="PersimmonModel",
    transformers=">=4.36,<5.25",
    variants={"no norms on q and k": {"qk_layernorm": False}},
)
