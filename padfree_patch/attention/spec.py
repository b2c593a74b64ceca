"""What one attention call asks for, and what a backend must have to answer it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from ..batch.sequences import PackedSequences
from ..errors import PadfreeError


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one attention call asks of a backend."""

    device: str
    """Device type: "cpu", "cuda", ..."""
    dtype: torch.dtype
    head_dim: int
    window: int = 0
    """Newest tokens that a query sees, itself included; 0 for all."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap); 0 for none."""
    dropout: float = 0.0
    """Probability with which an attention weight is dropped."""
    prompts: bool = False
    """Whether sequences go on from prompts that they share."""
    sinks: bool = False
    """Whether each head has a sink: one more logit in every softmax, whose weight goes nowhere."""

    def __str__(self) -> str:
        asked = [f"dtype={str(self.dtype).removeprefix('torch.')}", f"device={self.device}"]
        asked += [f"head_dim={self.head_dim}"]
        options = ("window", "softcap", "dropout", "prompts", "sinks")
        asked += [f"{name}={getattr(self, name)}" for name in options if getattr(self, name)]
        return ", ".join(asked)


class Backend(Protocol):
    """A module in this folder. mypy compares every module of `padfree_patch.attention.BACKENDS` with this."""

    NAME: str
    """What `backend=` takes, and what errors call it."""
    ANY_VALUE_SIZE: bool
    """Whether values may have another head size than queries and keys."""
    KNOWS_PROMPTS: bool
    """Whether sequences may go on from prompts that they share (`PackedSequences.prefixes`)."""
    KNOWS_SINKS: bool
    """Whether heads may have sinks."""
    KNOWS_KEY_BIAS: bool
    """Whether it adds a bias to the scores of keys; if not, its caller hides the bias in channels (`key_bias`)."""

    def refusal(self, needs: Needs) -> str | None:
        """Says why this backend can't do what a call needs; None if it can."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """Computes causal attention inside each sequence, never across two.

        A sequence that goes on from a shared prompt sees all of that too, before its own tokens.

        T tokens of all sequences end to end, H query heads, K key/value heads, D head size. Whoever calls this has
        asked `padfree_patch.attention.refusal` before.

        Args:
            q: (T, H, D).
            k, v: (T, K, D), with H a multiple of K.
            sequences: their lengths add up to T; lengths 2, 4, 3 have cu_seqlens [0, 2, 6, 9].
            scale: factor on q @ k.T before the softmax; usually D ** -0.5.
            window: newest tokens that a query sees, itself included; 0 for all of its sequence and prompt.
            softcap: scores become softcap * tanh(scores / softcap); 0 for none.
            dropout: probability with which an attention weight is dropped.
            sinks: (H,), one more logit of each head in every softmax, whose weight goes nowhere; None for none.
            key_bias: (H, T), added to the scores of each key before they are scaled, without a gradient; None for none.

        Returns (T, H, D), in the dtype of q.
        """
        ...


def check_shapes(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences) -> None:
    """Raises PadfreeError unless q, k, v and the sequences have the shapes that `Backend.attend` names."""
    if (wanted := _wrong_shapes(q, k, v, sequences)) is not None:  # called in every layer: a text only if it is wrong
        raise PadfreeError(f"{wanted}; found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


def _wrong_shapes(q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences) -> str | None:
    """Says what shapes should be that are not so; None if all are."""
    if not q.dim() == k.dim() == v.dim() == 3:
        return "attention takes q, k and v as (tokens, heads, head size)"
    if not len(q) == len(k) == len(v) == sequences.total:
        return f"attention over {sequences.total} tokens takes as many in q, k and v"
    heads, key_heads = q.shape[1], k.shape[1]
    if v.shape[1] != key_heads or not key_heads or heads % key_heads:
        return "attention takes as many heads in k as in v, and a multiple of them in q"
    if q.shape[2] != k.shape[2]:
        return "attention takes q and k of one head size, which comes last"
    return None
