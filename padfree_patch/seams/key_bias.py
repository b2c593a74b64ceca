"""ALiBi and its kind: a bias on the scores of each key, made for each sequence.

Upstream's `build_alibi_tensor` counts positions over the row. A packed row gets none from it; the patch makes one for
each sequence (`Patch.attention_call`).
"""

from __future__ import annotations

import sys

from torch import nn

from ..models import pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .kinds import Found, class_named
from .mask import concerns

NAME = "key bias"

BUILDER = "build_alibi_tensor"


def find(model: nn.Module, patch: Patch) -> Found:
    files = {class_named(m, patch.decoder).__module__ for m in pretrained_modules(model) if patch.is_decoder(m)}
    return Found(
        frozenset(Seam(each, BUILDER, concerns, answer) for each in files if hasattr(sys.modules[each], BUILDER))
    )


def answer(call: Call) -> None:
    """Answers upstream's builder of ALiBi: a packed row has none."""
