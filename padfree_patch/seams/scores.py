"""What stands in an eager attention forward for the scores of T x T, which a packed batch never computes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import PadfreeError
from ..upstream import Function


@dataclasses.dataclass(frozen=True, eq=False)
class UncomputedScores:
    """Stands for the scores (B, H, T, T) while upstream scales, softmaxes and drops them, and notes what it does."""

    q: Tensor
    k: Tensor
    owner: str
    """Class of the attention module, for errors."""
    biased: bool
    """Whether the patch has a bias on keys, which upstream then may add."""
    scale: float = 1.0
    dropout: float = 0.0
    softmaxed: bool = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:3], self.k.shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __mul__(self, factor: object) -> UncomputedScores:
        if self.softmaxed or not isinstance(factor, (int, float)):
            when = "after" if self.softmaxed else "before"
            raise PadfreeError(
                f"{self.owner} multiplies its attention scores by {_described(factor)} {when} the softmax; "
                "padfree_patch knows only a number before it"
            )
        return dataclasses.replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> UncomputedScores:
        return self * (1.0 / divisor if isinstance(divisor, (int, float)) else divisor)

    def __add__(self, other: object) -> UncomputedScores:
        """Takes what upstream adds: its mask, or the bias that the patch declared.

        Of a packed batch the mask is None or has one element. The kernel adds the declared bias, so it is dropped here.
        """
        if other is None or (isinstance(other, Tensor) and other.numel() <= 1):
            return self
        if self.biased and isinstance(other, Tensor) and other.shape[-2] == 1:
            return self
        raise PadfreeError(
            f"{self.owner} adds {_described(other)} to its attention scores; padfree_patch knows no such bias"
        )

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]  # which `KernelMode` answers

    def to(self, *_: object, **__: object) -> UncomputedScores:
        """Returns itself: the backend works in the dtype of q, with the softmax in float32."""
        return self

    type_as = view = to

    def after_softmax(self) -> UncomputedScores:
        return dataclasses.replace(self, softmaxed=True)

    def after_dropout(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> UncomputedScores:
        assert self.softmaxed
        return dataclasses.replace(self, dropout=p if training else 0.0)

    @classmethod
    def __torch_function__(
        cls, func: Function, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        # Makes torch functions accept a stand-in; while one exists, `KernelMode` is active and comes first.
        raise PadfreeError(f"attention scores of a packed batch left their forward ({func})")

    float = to  # last, because annotations above mean the type


class KnownMaximum(int):
    """The largest last position of a packed batch, known without a device sync.

    Before 4.48, classes for flash-attn call `position_ids[:, -1].max().item()` in every layer to size their rotary
    tables. This int answers from the known lengths, so no layer waits for the device.
    """

    def item(self) -> int:
        return int(self)


def _described(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
