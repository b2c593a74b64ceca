"""The kernel call of one attention module while torch.compile traces it: one operator of the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..wrapping.opt_in import OptIn
from .kernel import autocast_dtype

_PRIVATE = (
    "_AutoDispatchBelowAutograd",
    "_ForceDispatchKeyGuard",
    "_dispatch_tls_local_exclude_set",
    "_dispatch_tls_local_include_set",
)
"""What `graph.py` needs of torch._C, which may be gone one day."""

operator: Callable[..., Tensor] | None = None
"""What stands for attention in a graph; None where torch, as until 2.4, can't make such operators."""
if hasattr(torch.library, "custom_op") and all(hasattr(torch._C, name) for name in _PRIVATE):
    from .graph import attend as operator


class TracedKernel:
    """Answers the kernel call of an attention module as `PackedKernel` does, in a graph."""

    def __init__(self, module: nn.Module, mask: Tensor):
        """Takes the module, and the stand-in for its mask."""
        self.owner = type(module).__name__
        self.key_bias = None
        self.answered = False
        self.attending = False
        self._module, self._mask = module, mask

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Computes (B, H, T, D) as `PackedKernel.attend` does."""
        assert operator is not None
        self.answered = True
        if (dtype := autocast_dtype(q, k, v)) is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scale = float(q.shape[3]) ** -0.5 if scale is None else float(scale)
        seed = torch.randint(2**31, (), device="cpu") if dropout else None
        opt_in = OptIn.of(self._module)
        backend = opt_in.backend if opt_in is not None else "auto"
        boundaries, window = self._mask[0, 0, 0, 0], self._mask.shape[2] - 1 if window is None else window
        out = operator(q, k, v, boundaries, seed, window, scale, softcap, dropout, backend)
        return out.transpose(1, 2)


class _Tracing:
    kernel: TracedKernel | None = None


tracing = _Tracing()
"""Whose `kernel` upstream's function around flash-attn is called for, while torch.compile traces; at no other time."""


def is_causal(module: nn.Module) -> bool:
    """Whether a module, and its config, leave it at causal attention; `check_causal` raises the error if not."""
    of_config = getattr(getattr(module, "config", None), "is_causal", True)
    return getattr(module, "is_causal", True) is not False and of_config is not False
