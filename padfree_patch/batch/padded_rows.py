"""The packed row that holds the tokens of a padded batch, and the way back to the batch."""

from __future__ import annotations

from torch import Tensor

from ..errors import PadfreeError
from .sequences import PackedSequences


class RowOfPadded(PackedSequences):
    """The sequences of a packed row that was made of a padded batch, and where its tokens stood there."""

    __slots__ = ("_indices", "_shape")

    _indices: Tensor
    """int64 (tokens,), counted over the batch."""
    _shape: tuple[int, int]

    @classmethod
    def of_mask(cls, mask: Tensor) -> RowOfPadded | None:
        """Makes them of a 0/1 mask (B, T): one sequence per row that has tokens. One device sync.

        Returns None if there is no padding, or no token, or the mask says something else: segment numbers, or holes
        inside a text.

        >>> import torch
        >>> RowOfPadded.of_mask(torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])).lengths
        (2, 2)
        """
        values = mask.cpu()
        real = values == 1
        stretches = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
        if real.all() or not real.any() or not (real | (values == 0)).all() or stretches.max() > 1:
            return None
        made = cls.from_lengths([length for length in real.sum(1).tolist() if length], device=mask.device)
        assert isinstance(made, RowOfPadded)
        made._shape = mask.shape[0], mask.shape[1]
        made._indices = real.flatten().nonzero()[:, 0].to(mask.device, non_blocking=True)
        return made

    def pack(self, values: Tensor) -> Tensor:
        """Returns (1, tokens, ...): the tokens' values of (B, T, ...), or of (1, T, ...) that all rows share."""
        values = values.expand(self._shape[0], *values.shape[1:])
        return values.flatten(0, 1).index_select(0, self._indices)[None]

    def pad(self, result: object) -> object:
        """Puts every tensor of a result, inside tuples and dicts too, where its tokens stood; zeros are the padding.

        A tensor is (1, tokens, ...), or (tokens, ...) as router logits are, or one value of all.

        Raises PadfreeError if it is anything else.
        """
        if isinstance(result, Tensor):
            return self._pad_tensor(result) if result.dim() else result
        if isinstance(result, tuple | list):
            return type(result)(self.pad(each) for each in result)
        if isinstance(result, dict):  # a ModelOutput, whose fields are attributes too
            for name in list(result):
                result[name] = self.pad(result[name])
        return result

    def _pad_tensor(self, tensor: Tensor) -> Tensor:
        in_row = tensor.dim() > 1 and tensor.shape[:2] == (1, self.total)
        if not in_row and tensor.shape[0] != self.total:
            raise PadfreeError(
                f"a result of shape {tuple(tensor.shape)} has no value for each of the {self.total} tokens of a packed "
                "row, so it cannot be put back into a padded batch; call remove() on what pack_padded returned"
            )
        values = tensor[0] if in_row else tensor
        rows, length = self._shape
        padded = values.new_zeros(rows * length, *values.shape[1:]).index_copy(0, self._indices, values)
        return padded.view(rows, length, *values.shape[1:]) if in_row else padded
