"""Router logits that upstream records of each call of a router, where a layer around it ran on each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "router_logits"


def join_recorded(output: object, tokens: int) -> None:
    """Joins the router logits of a forward's output, so that there are as many as layers again, not one per sequence.

    The loss of a mixture, which the head computes of them, counts layers. Anything else is left as it is.

    Args:
        output: of a decoder. What it recorded is (tokens, E) or (1, tokens, E) for each call, in the order of calls.
        tokens: of the whole batch.
    """
    recorded = getattr(output, NAME, None)
    if not isinstance(recorded, tuple) or not all(isinstance(each, Tensor) for each in recorded):
        return
    joined: list[Tensor] = []
    parts: list[Tensor] = []
    for each in recorded:
        parts.append(each)
        if sum(_rows(part) for part in parts) == tokens:
            joined.append(parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, -2) for part in parts]))
            parts = []
    if not parts and len(joined) < len(recorded):
        setattr(output, NAME, tuple(joined))


def _rows(logits: Tensor) -> int:
    return logits.shape[:-1].numel()
