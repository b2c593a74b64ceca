"""Gemma 3, its language model: windows and a rotary of their own on five layers of six.

Needs nothing of its own from 4.53 on. Before, a layer cuts its window out of the mask that it is handed, and runs on
each sequence. The whole Gemma 3, which sees, has the type gemma3: the ways that any decoder is entered in.

Read against models/gemma3/modeling_gemma3.py of transformers 4.53.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch, versions

PATCH = Patch(
    model_type="gemma3_text",
    attention="Gemma3Attention",
    decoder="Gemma3TextModel",
    transformers=">=4.50,<5.25",
    any_decoder=versions.transformers("<4.53"),
    tiny={"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
)
