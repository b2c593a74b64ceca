"""Packs a `datasets.Dataset` into rows of examples, with Arrow: no token is ever a Python object."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PadfreeError
from .packing_plan import check_not_empty, plan_packing

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("padfree_patch.dataset")  # the name that is documented

PER_TOKEN = ("labels", "position_ids", "token_type_ids")
"""Columns, beside masks, that have a value per token or are wrong."""

TOO_LONG = ("error", "cut", "split", "drop")


def pack_dataset(
    dataset: datasets.Dataset, max_length: int, *, column: str = "input_ids", too_long: str = "error"
) -> datasets.Dataset:
    """Packs examples into rows of at most `max_length` tokens, by best-fit decreasing (`plan_packing`).

    Every list column that is as long as `column` in each example (labels, masks) is joined row by row; other columns
    are left out, and the log says which. `position_ids` restart at every example, and `seq_lengths` holds the tokens of
    each, TRL's name: the collators read either. No example is divided and no token lost, unless `too_long` asks for it;
    then the log says how many (logger padfree_patch.dataset).

    Args:
        dataset: tokenised, not padded.
        max_length: tokens that a row holds at most.
        column: what the tokens are in.
        too_long: what to do with an example that has more than `max_length` tokens. "error"; "cut" its end; "split" it
            into examples of `max_length`, and a rest; or "drop" it.

    Raises PadfreeError if this is no `datasets.Dataset`, has no such column or is packed already, or if an example is
    empty, padded or too long, or has labels or a mask of another length.
    """
    import datasets
    import pyarrow as pa

    if not isinstance(dataset, datasets.Dataset):
        raise PadfreeError(
            f"pack_dataset takes a datasets.Dataset, found {type(dataset).__name__}; pack each split by itself, and a "
            "stream with TokenBudgetBatchSampler or the collator's max_tokens"
        )
    if "seq_lengths" in dataset.column_names:
        raise PadfreeError("the dataset is packed already: its rows have seq_lengths")
    if too_long not in TOO_LONG:
        raise PadfreeError(f"too_long={too_long!r}; choose one of {', '.join(TOO_LONG)}")
    if column not in dataset.column_names:
        raise PadfreeError(f"no column {column!r} to pack by; the dataset has {', '.join(dataset.column_names)}")
    table = dataset.with_format("arrow")[:]
    columns = {name: _as_list_array(table.column(name)) for name in table.column_names}
    tokens = columns[column]
    if tokens is None:
        raise PadfreeError(
            f"column {column!r} holds no lists of numbers, but {table.column(column).type}; tokenise first"
        )
    lengths = _lengths(tokens)
    check_not_empty(lengths)
    columns = _per_token(columns, lengths)
    _check_single(columns, lengths)
    starts, lengths = _fitted(lengths, max_length, too_long)
    plan = plan_packing(lengths, max_length)
    logger.info("%s", plan)
    order = np.concatenate(plan.rows)
    of_rows = np.array([len(row) for row in plan.rows])
    in_order = lengths[order]
    # Where each token of the packed rows comes from: its example's start, and how far into it.
    within = np.arange(in_order.sum()) - np.repeat(np.cumsum(in_order) - in_order, in_order)
    source = np.repeat(starts[order], in_order) + within
    ends = np.cumsum(in_order)[np.cumsum(of_rows) - 1]
    offsets = pa.array(np.concatenate(([0], ends)), pa.int64())
    packed: dict[str, Any] = {
        name: pa.LargeListArray.from_arrays(offsets, each.flatten().take(pa.array(source)))
        for name, each in columns.items()
        if name != "position_ids"
    }
    packed["position_ids"] = pa.LargeListArray.from_arrays(offsets, pa.array(within))
    examples = pa.array(np.concatenate(([0], np.cumsum(of_rows))), pa.int64())
    packed["seq_lengths"] = pa.LargeListArray.from_arrays(examples, pa.array(in_order))
    return datasets.Dataset(pa.table(packed))


def _as_list_array(column: Any) -> Any:
    """One list array of numbers, or None if the column is something else."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column, kind = column.cast(pa.large_list(kind.value_type)), pa.large_list(kind.value_type)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    of_numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not any(is_kind(kind.value_type) for is_kind in of_numbers):
        return None
    return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)


def _per_token(columns: dict[str, Any], lengths: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The columns with a value per token."""
    found, others = {}, []
    for name, each in columns.items():
        if each is not None and np.array_equal(_lengths(each), lengths):
            found[name] = each
        elif each is not None and (name in PER_TOKEN or name.endswith("_mask")):
            example = int(np.argmax(_lengths(each) != lengths))
            raise PadfreeError(
                f"example {example} has {lengths[example]} tokens, but {_lengths(each)[example]} {name}; "
                "mend it, or leave the column out"
            )
        else:
            others.append(name)
    if others:
        logger.info("left out columns that have no value per token: %s", ", ".join(others))
    return found


def _check_single(columns: dict[str, Any], lengths: np.ndarray[Any, Any]) -> None:
    """Raises PadfreeError for an example that is padded, or holds several itself: what says so would be lost."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if "attention_mask" in columns:
        mask = np.asarray(columns["attention_mask"].flatten().cast("int64"))
        for wrong, what in ((mask == 0, "is padded"), (mask > 1, "holds several examples (segments in its mask)")):
            if wrong.any():
                raise PadfreeError(f"example {owner[np.argmax(wrong)]} {what}; pack_dataset takes them one by one")
    if "position_ids" in columns:
        positions = np.asarray(columns["position_ids"].flatten())
        restarts = (np.diff(positions) != 1) & (np.diff(owner) == 0)
        if restarts.any():
            raise PadfreeError(
                f"example {owner[np.argmax(restarts)]} holds several examples (its position_ids restart); "
                "pack_dataset takes them one by one"
            )


def _lengths(lists: Any) -> np.ndarray[Any, Any]:
    return np.asarray(lists.value_lengths().fill_null(0)).astype(np.int64)


def _fitted(
    lengths: np.ndarray[Any, Any], most: int, too_long: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where examples start among all tokens, and their lengths, with those over `most` treated as asked."""
    starts = np.cumsum(lengths) - lengths
    over = lengths > most
    if not over.any() or too_long == "error":  # the caller refuses
        return starts, lengths
    count, beyond = int(over.sum()), int((lengths[over] - most).sum())
    if too_long == "drop":
        logger.warning("left out %d of %d examples, %d tokens", count, len(lengths), int(lengths[over].sum()))
        return starts[~over], lengths[~over]
    if too_long == "cut":
        logger.warning("cut %d of %d examples, by %d tokens", count, len(lengths), beyond)
        return starts, np.minimum(lengths, most)
    parts = -(-lengths // most)
    logger.warning("split %d of %d examples into %d", count, len(lengths), int(parts[over].sum()))
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    return np.repeat(starts, parts) + number * most, np.minimum(np.repeat(lengths, parts) - number * most, most)
