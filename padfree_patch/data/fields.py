"""Reads the fields of examples as numpy arrays, checks them, and joins or stacks them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..batch.boundaries import jump_of_positions, lengths_of_segments
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError

Feature = Mapping[str, object]
"""An example of a data set: its fields by name."""

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.generic]
Mask = npt.NDArray[np.bool_]

LABEL_MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns that say by a 0 which tokens are not trained; both may be there."""

BOUNDARIES = ("seq_lengths", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "packed_sequences")
"""Fields, beside an `attention_mask` of segment numbers, by which an example may say that it holds several."""

READ = ("input_ids", "labels", "attention_mask", *LABEL_MASKS, *BOUNDARIES, "max_length_q", "max_length_k")
"""Fields that a collator reads, or whose meaning it reads elsewhere."""


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


def unread_fields(features: Sequence[Feature], read: Collection[str]) -> list[str]:
    """Returns the names of fields that have a value somewhere and are not among those that are `read`."""
    names = {name for feature in features for name, value in feature.items() if value is not None}
    return sorted(map(str, names - set(read)))


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


def lengths_inside(feature: Feature, tokens: int, index: int, *, keeps_positions: bool = False) -> list[int]:
    """Returns tokens per example of a feature, which may itself be a packed row of several examples.

    Args:
        feature: the example.
        tokens: how many it has.
        index: in the batch.
        keeps_positions: whether its position_ids go into the batch as they are, so that other fields say where
            examples end.

    Raises PadfreeError if its fields disagree about them, or do not cover its number of `tokens`.
    """
    lengths_by_field = _lengths_by_field(feature, tokens, index)
    if keeps_positions:
        lengths_by_field.pop("position_ids", None)
    else:
        _check_no_jump(feature, lengths_by_field, index)
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
    if mask_values(feature, "attention_mask", tokens, f"example {index}").max(initial=0) > 1:
        lengths["attention_mask"] = _lengths_of_segments(feature, "attention_mask", index)
    if feature.get("seq_idx") is not None:
        lengths["seq_idx"] = _lengths_of_segments(feature, "seq_idx", index)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if feature.get(name) is not None:
            cu_seqlens = torch.from_numpy(token_values(feature, name, index))
            lengths[name] = list(PackedSequences.from_cu_seqlens(cu_seqlens).lengths)
    if isinstance(packed := feature.get("packed_sequences"), PackedSequences):
        lengths["packed_sequences"] = list(packed.lengths)
    return lengths


def _check_no_jump(feature: Feature, lengths_by_field: dict[str, list[int]], index: int) -> None:
    """Raises PadfreeError for position_ids that jump ahead where no other field says that an example ends."""
    said = lengths_by_field.get("position_ids")
    if said is None or list(lengths_by_field.values()).count(said) > 1:
        return
    jump = jump_of_positions(torch.from_numpy(token_values(feature, "position_ids", index)))
    if jump is not None:
        raise PadfreeError(
            f"example {index}: position_ids jump ahead from {jump.before} to {jump.after} after token {jump.token}. If "
            f"an example ends there, give seq_lengths={said} too. If the text goes on, its positions would be lost, "
            "because the collator counts its own: name position_ids in token_fields=, and give seq_lengths and "
            "return_flash_attn_kwargs=True, or leave the field out"
        )


def _lengths_of_segments(feature: Feature, name: str, index: int) -> list[int]:
    return lengths_of_segments(torch.from_numpy(token_values(feature, name, index)))


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


def as_tensors(batch: Mapping[str, object], kind: str) -> dict[str, Any]:
    """Returns the batch with its arrays as they are ("np") or as tensors ("pt")."""
    if not isinstance(kind, str) or kind not in ("pt", "np"):
        raise PadfreeError(f"return_tensors={kind!r}; choose 'pt' or 'np'")
    if kind == "np":
        return dict(batch)
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
