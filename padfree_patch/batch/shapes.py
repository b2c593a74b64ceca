"""What the caller gives beside the tokens, told by its shape: brought to theirs, left to upstream, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import PadfreeError
from .host import exceeds


def checked_positions(position_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if position_ids is None or tuple(position_ids.shape) == shape:
        return position_ids
    if tuple(position_ids.shape) == (1, shape[1]):  # upstream broadcasts them over the rows
        return position_ids.expand(shape)
    raise PadfreeError(f"position_ids have shape {tuple(position_ids.shape)}, but the tokens have {shape}")


def mask_of_tokens(attention_mask: object, shape: tuple[int, int], generating: bool) -> Tensor | None:
    """Returns the part of a 2-D mask that is about the tokens of this call, or None if there is none."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0]:
        return None
    if generating and attention_mask.shape[1] > shape[1]:  # it begins with what is in the cache
        return attention_mask[:, -shape[1] :]
    return attention_mask if attention_mask.shape[1] == shape[1] else None


def isolates(attention_mask: object, shape: tuple[int, int]) -> bool:
    """Whether a mask says of each pair of tokens whether one sees the other: then the caller isolates.

    Such are 4-D tensors (B, heads, T, T or more keys), dicts of them, and objects such as flex attention's. A mask that
    says something of each token alone, in whatever shape, tells no example from the next.
    """
    if isinstance(attention_mask, Tensor):
        tokens = shape[1]
        return attention_mask.dim() == 4 and attention_mask.shape[2] == tokens <= attention_mask.shape[3]
    if isinstance(attention_mask, Mapping):
        return bool(attention_mask) and all(isolates(each, shape) for each in attention_mask.values())
    return attention_mask is not None and not isinstance(attention_mask, Sequence | np.ndarray)


def check_no_segments(attention_mask: object, shape: tuple[int, int]) -> None:
    """Raises PadfreeError if a mask of another shape holds segment numbers: they can't be meant for these tokens."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype == torch.bool:
        return
    is_bias = attention_mask.dim() == 4 and attention_mask.is_floating_point()
    if not is_bias and exceeds(attention_mask, 1):
        raise PadfreeError(f"attention_mask holds segment numbers of shape {tuple(attention_mask.shape)} for {shape}")


def mask_refused(attention_mask: object, shape: tuple[int, int]) -> PadfreeError:
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    return PadfreeError(
        f"the batch is packed, but its attention_mask is {found} instead of {shape}; leave the mask out, "
        "because what says where the sequences end says it all"
    )


def is_unreadable(tensor: Tensor | None) -> bool:
    """Whether there are no values: tensors on the meta device, and those that code is traced with."""
    return tensor is not None and (tensor.device.type == "meta" or isinstance(tensor, FakeTensor))
