"""The kernel call of one attention module on a packed batch, answered by a varlen backend.

Every kind of attention seam comes here in the end, with queries, keys and values as upstream has made them.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import attention
from ..attention.key_bias import BIAS_CHANNELS, with_key_bias
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from .answers import note_answer
from .kinds import check_causal
from .stand_in import Recipe

_recorded: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("padfree_patch_windows", default=None)
_backends: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("padfree_patch_backends", default=None)


class PackedKernel:
    """Answers the kernel call of one attention module, once its forward comes to it."""

    def __init__(
        self,
        module: nn.Module | None,
        sequences: PackedSequences,
        recipe: Recipe,
        backend: str,
        key_bias: Tensor | None = None,
    ):
        if module is not None:
            check_causal(module)  # it may have been switched since apply
        self.owner = "a layer of a compiled graph" if module is None else type(module).__name__
        """Class of the module, for errors."""
        self.key_bias = key_bias
        """What is added to the scores of each key before they are scaled, (H, B * T), or None."""
        self.answered = False
        """Whether the forward has come to the kernel."""
        self.attending = False
        """Whether the backend is at work: what it calls is no kernel call of upstream's."""
        self._module = module
        self._sequences, self._recipe, self._backend = sequences, recipe, backend

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
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Computes causal attention inside each sequence.

        Args:
            q: (B, H, T, D).
            k: (B, K, T, D).
            v: (B, K, T, D), or with another last dimension, as in latent attention.
            scale: factor on the scores; None for D ** -0.5.
            dropout: probability with which an attention weight is dropped.
            window: newest tokens that a query sees, itself included; 0 for all, None for what the mask's recipe says.
            softcap: scores become softcap * tanh(scores / softcap); 0 for none.
            sinks: (H,), one more logit of each head in every softmax; None for none.

        Returns (B, H, T, D), with the last dimension of v.
        """
        window = self._recipe.window if window is None else window
        if (windows := _recorded.get()) is not None:
            windows.append(window)
        self._check_tokens(q, k)
        prompts = self._sequences.prefixes is not None
        if dropout and prompts:
            raise PadfreeError(
                f"{self.owner}: attention dropout {dropout} of examples that share a prompt would be drawn once for "
                "the prompt, not once for each; set it to 0, or collate without share_prompts and share_prefixes"
            )
        self.answered = True
        note_answer(self._module)
        rows, head_dim, of_values, result_dtype = q.shape[0], q.shape[3], v.shape[3], v.dtype
        scale = head_dim**-0.5 if scale is None else scale
        if (autocast := autocast_dtype(q, k, v)) is not None:
            q, k, v = (x.to(autocast) for x in (q, k, v))
            result_dtype = autocast
        wide = max(head_dim, of_values) + (BIAS_CHANNELS if self.key_bias is not None else 0)
        needs = attention.Needs(q.device.type, result_dtype, wide, window, softcap, dropout, prompts, sinks is not None)
        backend = attention.select(needs, self._backend)
        if (backends := _backends.get()) is not None:
            backends.add(backend.NAME)
        dtype = _working_dtype(backend, needs, q, k, v)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        bias = self.key_bias
        if bias is not None and not backend.KNOWS_KEY_BIAS:
            (q, k, v), bias = with_key_bias(q, k, v, bias), None
        if head_dim != of_values and not backend.ANY_VALUE_SIZE:  # channels of zeros change no score and no value
            q, k, v = (F.pad(x, (0, wide - x.shape[3])) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
        options: dict[str, Any] = {"window": window, "softcap": softcap, "dropout": dropout}
        self.attending = True
        try:
            output = backend.attend(q, k, v, self._sequences, scale=scale, sinks=sinks, key_bias=bias, **options)
        finally:
            self.attending = False
        return output[..., :of_values].to(result_dtype).unflatten(0, (rows, -1)).transpose(1, 2)

    def _check_tokens(self, q: Tensor, k: Tensor) -> None:
        queries, keys, total = q.shape[0] * q.shape[2], k.shape[0] * k.shape[2], self._sequences.total
        if not queries == keys == total:
            raise PadfreeError(
                f"{self.owner}: the batch has {total} tokens, but its kernel was called on {queries} queries "
                f"and {keys} keys"
            )


@contextmanager
def recording_windows() -> Iterator[list[int]]:
    """Collects the windows that kernels are called with from here on, in this thread: tokens seen, 0 for all."""
    windows: list[int] = []
    token = _recorded.set(windows)
    try:
        yield windows
    finally:
        _recorded.reset(token)


@contextmanager
def recording_backends() -> Iterator[set[str]]:
    """Collects the names of the backends that answer kernel calls from here on, in this thread."""
    backends: set[str] = set()
    token = _backends.set(backends)
    try:
        yield backends
    finally:
        _backends.reset(token)


def _working_dtype(backend: attention.Backend, needs: attention.Needs, *tensors: Tensor) -> torch.dtype:
    """Returns the dtype in which a backend gets queries, keys and values.

    Phi casts queries and keys up for its eager product, and gets what it casts down to the values' dtype. A kernel that
    takes the values' dtype only has its scores in float32 anyway, so there the cast is left out.
    """
    finest = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    if finest == needs.dtype or backend.refusal(dataclasses.replace(needs, dtype=finest)) is not None:
        return needs.dtype
    return finest


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """Returns what autocast would compute the kernel in: a kernel from outside torch does not see autocast itself.

    None if it leaves the kernel alone: it is off, or there is a float64 tensor, which it never casts.
    """
    device_type = tensors[0].device.type
    if any(x.dtype == torch.float64 for x in tensors):
        return None
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except (AttributeError, TypeError):  # before torch 2.4
        return torch.get_autocast_gpu_dtype() if device_type == "cuda" and torch.is_autocast_enabled() else None
