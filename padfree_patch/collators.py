"""Collators that flatten examples into one row instead of padding them, and say where each ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import PadfreeError
from .packing import PackedSequences


class DataCollatorWithFlattening:
    """Flattens a batch of examples into one row (1, T) without padding; upstream's newest, on every version.

    Arguments, defaults and results are those of `transformers.DataCollatorWithFlattening` 5.23, with these differences:
    an example without tokens, with padding, or with labels of another length is an error; and beside the
    FlashAttentionKwargs stands `packed_sequences`, the lengths as Python integers, from which a patched model works
    without reading anything back from the device.

    The label of each example's first token becomes `separator_id`, so that no example is trained to predict the
    beginning of the next one. How many sequences flash-attn's varlen backward can take at once,
    (tokens + 128 * sequences) * heads * head_dim rounded up to 32 < 2**31, depends on the model: the flash_attn backend
    checks it when the batch arrives there.

    Args:
        return_tensors: "pt" or "np".
        return_position_ids: return `position_ids`, which restart at `position_ids_start` for every example.
        separator_id: label of each example's first token.
        return_flash_attn_kwargs: return `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, and
            `packed_sequences`. An unpatched model refuses or ignores them.
        return_seq_idx: return `seq_idx`, the number of the example that a token belongs to, int32 (1, T).
        position_ids_start: position of each example's first token.
    """

    def __init__(
        self,
        return_tensors: str = "pt",
        *,
        return_position_ids: bool = True,
        separator_id: int = -100,
        return_flash_attn_kwargs: bool = False,
        return_seq_idx: bool = False,
        position_ids_start: int = 0,
    ):
        self.return_tensors = return_tensors
        self.return_position_ids = return_position_ids
        self.separator_id = separator_id
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.return_seq_idx = return_seq_idx
        self.position_ids_start = position_ids_start

    def __call__(
        self,
        features: Sequence[Mapping[str, Any]],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> dict[str, Any]:
        """Flattens examples.

        Args:
            features: each with `input_ids` and, if the first has them, `labels`, lists or 1-D tensors of one length.
            return_tensors, separator_id: instead of those given to the constructor.

        Returns int64 `input_ids` and `labels` (1, T), and what the constructor was asked for.

        Raises PadfreeError naming the example if one is empty, padded, or has labels of another length.
        """
        separator = self.separator_id if separator_id is None else separator_id
        if not features:
            raise PadfreeError("no examples to collate")
        tokens = [_values(feature, "input_ids", i) for i, feature in enumerate(features)]
        has_labels = "labels" in features[0]
        labels = [_values(feature, "labels", i) for i, feature in enumerate(features)] if has_labels else tokens
        for i, feature in enumerate(features):
            _check_example(i, len(features), tokens[i], labels[i], feature.get("attention_mask"))
        sequences = PackedSequences.from_lengths(map(len, tokens))
        positions = sequences.position_ids().numpy()
        batch: dict[str, Any] = {
            "input_ids": np.concatenate(tokens)[None],
            "labels": np.where(positions == 0, separator, np.concatenate(labels))[None],
        }
        if self.return_position_ids:
            batch["position_ids"] = (positions + self.position_ids_start)[None]
        if self.return_seq_idx:
            batch["seq_idx"] = np.repeat(np.arange(len(tokens), dtype=np.int32), sequences.lengths)[None]
        if self.return_flash_attn_kwargs:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = sequences.cu_seqlens.numpy()
            batch["max_length_q"] = batch["max_length_k"] = sequences.max_seqlen
        batch = _as_tensors(batch, return_tensors or self.return_tensors)
        if self.return_flash_attn_kwargs:
            batch["packed_sequences"] = sequences
        return batch


def _values(feature: Mapping[str, Any], name: str, index: int) -> np.ndarray[Any, Any]:
    if name not in feature:
        raise PadfreeError(f"example {index} has no {name}; it has {', '.join(feature) or 'nothing'}")
    return np.asarray(feature[name], dtype=np.int64).reshape(-1)


def _check_example(
    index: int, count: int, tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], attention_mask: Any
) -> None:
    if len(tokens) == 0:
        raise PadfreeError(f"example {index} of {count} has no tokens; drop empty examples from the data set")
    if len(labels) != len(tokens):
        raise PadfreeError(f"example {index} of {count} has {len(tokens)} tokens, but {len(labels)} labels")
    if attention_mask is not None and (padding := int((np.asarray(attention_mask) == 0).sum())):
        raise PadfreeError(f"example {index} of {count} is padded by {padding} tokens; tokenise with padding=False")


def _as_tensors(batch: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "np":
        return batch
    if kind != "pt":
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
