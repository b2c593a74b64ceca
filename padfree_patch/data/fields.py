"""Reads the fields of examples as numpy arrays, checks them, and joins or stacks them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..arguments import Integers, has_truth_values
from ..errors import PadfreeError
from .boundary_columns import BOUNDARY_FIELDS, KEPT

Batch = dict[str, Any]
"""What a collator makes, by the names of a model's arguments: tensors or numpy arrays, and sequences of ours."""

Feature = Mapping[str, object]
"""An example of a data set: its fields by name."""

Numbers = npt.NDArray[np.generic]
Mask = npt.NDArray[np.bool_]

LABEL_MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns that say by a 0 which tokens are not trained; both may be there."""

READ = ("input_ids", "labels", *LABEL_MASKS, *(name for name in BOUNDARY_FIELDS if name != KEPT))
"""Fields that a collator reads; `KEPT` too if `pack_dataset` wrote it."""


def list_of_examples(features: object, *, token_lists: bool = False) -> list[Feature]:
    """Returns the examples of a batch as a list.

    Args:
        features: any iterable of mappings.
        token_lists: whether an example may also be its tokens alone, a list or a tensor.

    Raises PadfreeError naming the first one that is no mapping, or saying that this is no list of examples.
    """
    is_one = isinstance(features, str | bytes | Mapping) or getattr(features, "ndim", 1) == 0
    if is_one or not isinstance(features, Iterable):
        raise PadfreeError(f"a collator takes a list of examples, each a dict of fields, found {_kind(features)}")
    examples: list[Feature] = []
    for i, feature in enumerate(features):
        if token_lists and isinstance(feature, Sequence | np.ndarray | torch.Tensor) and not isinstance(feature, str):
            feature = {"input_ids": feature}
        if not isinstance(feature, Mapping):
            raise PadfreeError(f"example {i} must be a dict of fields such as input_ids, found {_kind(feature)}")
        examples.append(feature)
    return examples


def _kind(value: object) -> str:
    keys = f" of {', '.join(map(str, list(value)[:8]))}" if isinstance(value, Mapping) else ""
    return f"{type(value).__name__}{keys}"


class LeftOut:
    """Warns of the fields that a collator leaves out, once of each."""

    def __init__(self, what_to_do: str):
        self._what_to_do = what_to_do
        self._known: set[str] = set()

    def warn_of(self, features: Sequence[Feature], read: Collection[str]) -> None:
        """Warns of fields that have a value in an example of a batch and are not among those that are `read`."""
        if unread := _unread_fields(features, {*read, *self._known}):
            self._known.update(unread)
            warnings.warn(f"the collator leaves out {', '.join(unread)}: {self._what_to_do}", stacklevel=4)


def _unread_fields(features: Sequence[Feature], read: set[str]) -> list[str]:
    names = {name for feature in features for name, value in feature.items() if value is not None}
    if all(kept_lengths(feature) is not None for feature in features if feature.get(KEPT) is not None):
        names -= {KEPT}
    return sorted(map(str, names - read))


def kept_lengths(feature: Feature) -> list[int] | None:
    """Returns tokens per example as a row of `pack_dataset` has them under `KEPT`; None if it has something else there.

    Raises PadfreeError if that, or its tokens, are no numbers of one shape.
    """
    if feature.get(KEPT) is None:
        return None
    values, tokens = (_as_array(feature.get(name), name) for name in (KEPT, "input_ids"))
    if values.ndim != 1 or values.dtype.kind != "i":
        return None
    lengths = -values.astype(np.int64)
    return lengths.tolist() if (lengths > 0).all() and lengths.sum() == tokens.size else None


def field_names(feature: Feature) -> str:
    """Lists the fields of an example, for error messages."""
    return ", ".join(map(str, feature)) or "nothing"


def token_values(feature: Feature, name: str, index: int) -> Integers:
    """Returns a field that holds tokens or labels, int64 (T,).

    Raises PadfreeError naming the example, by its `index` in the batch, if it has no such field or no integers there.
    """
    if feature.get(name) is None:
        raise PadfreeError(f"example {index} has no {name}; it has {field_names(feature)}")
    what = f"example {index}: {name}"
    values = _as_array(feature[name], what)
    if name == "labels" and values.ndim == 0 and values.dtype.kind in "iufb":
        raise PadfreeError(
            f"example {index}: labels is {values}, one value for the whole example, as for classification; a packed "
            "row needs a label per token. Rename the field, carry it with example_fields=, and pool with last_tokens"
        )
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise PadfreeError(f"{what} must be integers (T,), found {_described(feature[name], values)}")
    if isinstance(given := feature[name], list | tuple) and has_truth_values(given):
        raise PadfreeError(f"{what} must be integers (T,), found truth values among them")
    if values.dtype == np.uint64 and (largest := values.max(initial=0)) > np.iinfo(np.int64).max:
        raise PadfreeError(f"{what} must be integers (T,) of 64 bits, found {largest}")
    return values.astype(np.int64)


def label_masks(features: Sequence[Feature]) -> list[str]:
    """Returns which of TRL's masks of trained tokens the examples of a batch have."""
    return [name for name in LABEL_MASKS if any(feature.get(name) is not None for feature in features)]


def trained_tokens(feature: Feature, masks: Sequence[str], tokens: int, index: int) -> Mask:
    """Returns bool (T,): which tokens every one of the masks trains.

    Raises PadfreeError naming the example if it lacks a mask, or has one of another length.
    """
    trained = np.ones(tokens, dtype=np.bool_)
    for name in masks:
        if feature.get(name) is None:
            raise PadfreeError(f"example {index} has no {name}, but others have; it has {field_names(feature)}")
        trained &= mask_values(feature, name, tokens, f"example {index}") != 0
    return trained


def mask_values(feature: Feature, name: str, tokens: int, place: str) -> Numbers:
    """Returns a mask (T,) of an example; ones if it has none of that name.

    Raises PadfreeError naming the `place` of the example if the mask holds no numbers, or not one per token.
    """
    if feature.get(name) is None:
        return np.ones(tokens, dtype=np.int64)
    values = _as_array(feature[name], f"{place}: {name}")
    if values.ndim == 1 and len(values) != tokens:
        raise PadfreeError(f"{place} has {tokens} tokens, but {len(values)} values in its {name}")
    if values.ndim != 1 or values.dtype.kind not in "iufb":
        raise PadfreeError(f"{place}: {name} must be numbers (T,), found {_described(feature[name], values)}")
    numbers = values.astype(np.float64)
    if (wrong := numbers != np.round(numbers)).any():  # NaN too
        raise PadfreeError(f"{place}: {name} must be whole numbers, found {numbers[wrong][0]}")
    return values


def check_example(feature: Feature, tokens: Integers, labels: Integers, place: str) -> None:
    """Raises PadfreeError naming the example if it is empty, padded, or has labels or a mask of another length.

    Args:
        feature: the example.
        tokens, labels: of the example.
        place: what to call it, such as "example 2 of 8".
    """
    if len(tokens) == 0:
        raise PadfreeError(f"{place} has no tokens; drop empty examples from the data set")
    if len(labels) != len(tokens):
        raise PadfreeError(f"{place} has {len(tokens)} tokens, but {len(labels)} labels; it needs one per token")
    if padding := int((mask_values(feature, "attention_mask", len(tokens), place) == 0).sum()):
        raise PadfreeError(f"{place} is padded by {padding} tokens; tokenise with padding=False")


def join_row(parts: Sequence[Numbers], padding: int, value: int) -> Numbers:
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
    arrays = [_as_array(feature[name], f"example {i}: {name}") for i, feature in enumerate(features)]
    # As `torch.tensor` would: float32 for lists of floats.
    return [each.astype(np.float32) if _is_list_of_floats(f[name], each) else each for f, each in zip(features, arrays)]


def _is_list_of_floats(value: object, array: Numbers) -> bool:
    return array.dtype == np.float64 and not isinstance(value, np.ndarray | torch.Tensor)


def _check_numbers(values: Numbers, shape: tuple[int, ...], what: str) -> None:
    if values.shape != shape or values.dtype.kind not in "iufb":
        raise PadfreeError(f"{what} must be numbers {shape}, found {values.dtype} {values.shape}")


def _as_array(value: object, what: str) -> Numbers:
    """Makes an array of the values; of bfloat16, which numpy lacks, float32."""
    try:
        if isinstance(value, torch.Tensor):
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths, sparse tensors
        raise PadfreeError(
            f"{what} must be numbers of one shape, found a {_kind(value)} that is none: {error}"
        ) from error


def _described(value: object, array: Numbers) -> str:
    """Says of what type and shape a field is."""
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else str(array.dtype)
    return f"{dtype} {array.shape}"


def as_tensors(batch: Mapping[str, object], kind: str) -> Batch:
    """Returns the batch with its arrays as they are ("np") or as tensors ("pt")."""
    if not isinstance(kind, str) or kind not in ("pt", "np"):
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    if kind == "np":
        return dict(batch)
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
