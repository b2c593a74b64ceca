"""The tokens of a row whose examples share prompts: a tensor that nothing but a patched model can embed.

To any other model such a row looks like other examples: their positions go on from a prompt that stands elsewhere. A
model with `**kwargs` would drop `packed_sequences` and train on that, silently. But every model embeds its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PadfreeError

_EMBEDDINGS = (F.embedding, torch.embedding, F.embedding_bag, F.one_hot)


class SharedRow(Tensor):
    """Token ids (1, T), like any others except that embedding them is an error; `plain` gives those that can be."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in _EMBEDDINGS:
            raise PadfreeError(
                "the examples of this row share prompts, which only a model that is patched by padfree_patch.apply "
                "knows, if it is given the batch as the collator made it: input_ids with packed_sequences. Something "
                "else embeds these input_ids. Call padfree_patch.apply(model), or collate without share_prompts and "
                "share_prefixes"
            )
        return super().__torch_function__(func, types, args, kwargs or {})

    def plain(self) -> Tensor:
        """Returns the same token ids as an ordinary tensor, for whoever knows what they are."""
        return self.as_subclass(Tensor)
