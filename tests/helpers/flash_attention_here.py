"""Makes transformers believe that flash-attn runs on this machine, so that models load as flash_attention_2.

What it asks for, a CUDA device, no CPU has; whatever package `flash_attn` is on sys.path (the stand-in, or the real one
on its CPU kernels) then does the work. To be called before any modeling file is imported, which import flash-attn only
if it is available.
"""

from __future__ import annotations

import sys
from typing import Any


def pretend() -> None:
    import transformers.utils
    import transformers.utils.import_utils

    assert not any(".modeling_llama" in name for name in sys.modules), "a modeling file was imported too early"
    for name in ("is_flash_attn_available", "is_flash_attn_2_available"):  # the first is 4.34's
        for holder in (transformers.utils, transformers.utils.import_utils):
            if hasattr(holder, name):
                setattr(holder, name, lambda *args, **kwargs: True)

    from transformers import PreTrainedModel

    for name, answer in (
        ("_check_and_enable_flash_attn_2", classmethod(_enable)),  # 4.35 to 4.53
        ("_flash_attn_2_can_dispatch", _can_dispatch),  # 4.54 to 4.57
        ("_flash_attn_can_dispatch", _can_dispatch),  # 5.0 on
    ):
        if hasattr(PreTrainedModel, name):
            setattr(PreTrainedModel, name, answer)


def _enable(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    if not cls._supports_flash_attn_2:  # Llama 4 until 4.52, whose chunks its kernel would not know
        raise ValueError(f"{cls.__name__} does not support Flash Attention 2.0 yet")
    config._flash_attn_2_enabled = True  # 4.35
    config._attn_implementation = "flash_attention_2"
    return config


def _can_dispatch(*args: Any, **kwargs: Any) -> bool:
    return True
