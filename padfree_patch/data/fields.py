"""Reads the fields of examples as numpy arrays, checks them, and joins or stacks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..batch.boundaries import lengths_of_segments
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError

Feature = Mapping[str, object]
"""An example of a data set: its fields by name."""

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.generic]


def field_names(feature: Feature) -> str:
    """Lists the fields of an example, for error messages."""
    return ", ".join(feature) or "nothing"


def token_values(feature: Feature, name: str, index: int) -> Integers:
    """Returns a field that holds tokens or labels, int64 (T,).

    Raises PadfreeError naming the example, by its `index` in the batch, if it has no such field or no integers there.
    """
    if feature.get(name) is None:
        raise PadfreeError(f"example {index} has no {name}; it has {field_names(feature)}")
    values = np.asarray(feature[name])
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise PadfreeError(f"example {index}: {name} must be integers (T,), found {values.dtype} {values.shape}")
    return values.astype(np.int64)


def lengths_inside(feature: Feature, tokens: int, index: int) -> list[int]:
    """Returns tokens per example of a feature, which may itself be a packed row of several examples.

    Raises PadfreeError if its fields disagree about them, or do not cover its number of `tokens`.
    """
    lengths_by_field = _lengths_by_field(feature, tokens, index)
    if not lengths_by_field:
        return [tokens]
    lengths, *others = lengths_by_field.values()
    if sum(lengths) != tokens or any(other != lengths for other in others):
        said = " and ".join(f"{name} say {each}" for name, each in lengths_by_field.items())
        raise PadfreeError(f"example {index} has {tokens} tokens, but {said}")
    return lengths


def _lengths_by_field(feature: Feature, tokens: int, index: int) -> dict[str, list[int]]:
    """Returns tokens per example as each field says that can say it."""
    lengths = {}
    if feature.get("seq_lengths") is not None:
        lengths["seq_lengths"] = token_values(feature, "seq_lengths", index).tolist()
    if feature.get("position_ids") is not None:
        positions = token_values(feature, "position_ids", index)
        if len(positions) != tokens:
            raise PadfreeError(f"example {index} has {tokens} tokens, but {len(positions)} position_ids")
        lengths["position_ids"] = list(PackedSequences.from_position_ids(torch.from_numpy(positions)).lengths)
    if feature.get("attention_mask") is not None and np.asarray(feature["attention_mask"]).max(initial=0) > 1:
        lengths["attention_mask"] = _lengths_of_segments(feature, "attention_mask", index)
    if feature.get("seq_idx") is not None:
        lengths["seq_idx"] = _lengths_of_segments(feature, "seq_idx", index)
    return lengths


def _lengths_of_segments(feature: Feature, name: str, index: int) -> list[int]:
    return lengths_of_segments(torch.from_numpy(token_values(feature, name, index)))


def check_example(feature: Feature, tokens: Integers, labels: Integers, place: str) -> None:
    """Raises PadfreeError naming the example if it is empty, padded, or has labels of another length.

    Args:
        feature: the example.
        tokens, labels: of the example.
        place: what to call it, such as "example 2 of 8".
    """
    if len(tokens) == 0:
        raise PadfreeError(f"{place} has no tokens; drop empty examples from the data set")
    if len(labels) != len(tokens):
        raise PadfreeError(f"{place} has {len(tokens)} tokens, but {len(labels)} labels")
    mask = feature.get("attention_mask")
    if mask is not None and (padding := int((np.asarray(mask) == 0).sum())):
        raise PadfreeError(f"{place} is padded by {padding} tokens; tokenise with padding=False")


def join_row(parts: Sequence[npt.NDArray[Any]], padding: int, value: int) -> Numbers:
    """Joins arrays (T,) into one row (1, T), and adds `padding` times the value."""
    return np.pad(np.concatenate(parts), (0, padding), constant_values=value)[None]


def token_field(features: Sequence[Feature], name: str, lengths: Sequence[int]) -> list[Numbers]:
    """Returns a field with a value per token, (length,) for each feature.

    Raises PadfreeError naming the first example that lacks it, or has another number of values.
    """
    values = _number_field(features, name)
    for i, (value, length) in enumerate(zip(values, lengths)):
        _check_numbers(value, (length,), f"example {i} of {len(features)}: {name}")
    return values


def stack_field(features: Sequence[Feature], name: str) -> Numbers:
    """Stacks a field with a value per example: (features, ...).

    Raises PadfreeError naming the first example that lacks it, or has a value of another shape than the first one.
    """
    values = _number_field(features, name)
    for i, value in enumerate(values):
        _check_numbers(value, values[0].shape, f"example {i} of {len(features)}: {name}")
    return np.stack(values)


def _number_field(features: Sequence[Feature], name: str) -> list[Numbers]:
    for i, feature in enumerate(features):
        if feature.get(name) is None:
            raise PadfreeError(f"example {i} of {len(features)} has no {name}; it has {field_names(feature)}")
    return [_as_array(feature[name]) for feature in features]


def _check_numbers(values: Numbers, shape: tuple[int, ...], what: str) -> None:
    if values.shape != shape or values.dtype.kind not in "iufb":
        raise PadfreeError(f"{what} must be numbers {shape}, found {values.dtype} {values.shape}")


def _as_array(value: object) -> Numbers:
    """Makes an array of the type that `torch.tensor` would choose, float32 for lists of floats; bfloat16 as float32."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 and not isinstance(value, np.ndarray) else array


def as_tensors(batch: Mapping[str, object], kind: str) -> dict[str, Any]:
    """Returns the batch with its arrays as they are ("np") or as tensors ("pt")."""
    if kind == "np":
        return dict(batch)
    if kind != "pt":
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
