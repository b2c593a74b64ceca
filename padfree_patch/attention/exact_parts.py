"""Numbers in a coarser dtype: several of them that add up to one of float32."""

from __future__ import annotations

import torch
from torch import Tensor


def parts_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Splits x (...) into three numbers (..., 3) of a dtype that add up to it, to float32 in bfloat16 and float16.

    Each holds what the ones before round away. What is too large for the dtype becomes its largest number, thrice.

    >>> parts_of(torch.tensor(1.2345678), torch.bfloat16).tolist()
    [1.234375, 0.0001926422119140625, 1.1920928955078125e-07]
    """
    finest = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    rest, largest = x.to(finest), torch.finfo(dtype).max
    parts = []
    for _ in range(3):
        parts.append(rest.clamp(-largest, largest).to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return torch.stack(parts, dim=-1)
