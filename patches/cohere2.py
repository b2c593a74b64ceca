"""Command R7B and A (Cohere 2): windows with rotary on three layers of four, whole sequences without it on the fourth.

Needs nothing of its own from 4.53 on. Before, a layer cuts its window out of the mask that it is handed, and runs on
each sequence.

Read against models/cohere2/modeling_cohere2.py of transformers 4.48.3, 4.57.6 and 5.24.0.
"""

from padfree_patch import Patch, versions

PATCH = Patch(
    model_type="cohere2",
    attention="Cohere2Attention",
    decoder="Cohere2Model",
    transformers=">=4.48,<5.25",
    any_decoder=versions.transformers("<4.53"),
    tiny={"sliding_window": 4, "sliding_window_pattern": 2},
)
