"""Packs a `datasets.Dataset` into rows of examples, with Arrow: no token is ever a Python object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import PadfreeError
from .packing_plan import PackingPlan, check_not_empty, plan_packing

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

logger = logging.getLogger("padfree_patch.dataset")  # the name that the docstring gives

PER_TOKEN = ("labels", "position_ids", "token_type_ids")
"""Columns, beside masks, that have a value per token or are wrong."""

TOO_LONG = ("error", "cut", "split", "drop")

Integers = npt.NDArray[np.int64]


def pack_dataset(
    dataset: datasets.Dataset, max_length: int, *, column: str = "input_ids", too_long: str = "error"
) -> datasets.Dataset:
    """Packs examples into rows of at most `max_length` tokens, by best-fit decreasing (`plan_packing`).

    Every list column that is as long as `column` in each example (labels, masks) is joined row by row; other columns
    are left out, and the log says which. Four columns say where examples end, whichever of them a Trainer keeps:
    `position_ids` that restart at every example, its number in `seq_idx` (from 0) and in `attention_mask` (from 1), and
    `seq_lengths`, TRL's name, with the tokens of each. The collators read any of them; taking away the last one is an
    error. No example is divided and no token lost, unless `too_long` asks for it; then the log says how many (logger
    padfree_patch.dataset).

    Args:
        dataset: tokenised, not padded.
        max_length: tokens that a row holds at most.
        column: the column that holds the tokens.
        too_long: what to do with an example that has more than `max_length` tokens. "error"; "cut" its end; "split" it
            into examples of `max_length`, and a rest; or "drop" it.

    Raises PadfreeError if this is no `datasets.Dataset`, has no such column or is packed already, or if an example is
    empty, padded or too long, or has labels or a mask of another length.
    """
    import datasets
    import pyarrow as pa

    from .packed_rows import as_packed

    _check_arguments(dataset, column, too_long)
    table = dataset.with_format("arrow")[:]
    columns = {name: _as_list_array(table.column(name)) for name in table.column_names}
    tokens = columns[column]
    if tokens is None:
        raise PadfreeError(
            f"column {column!r} holds no lists of numbers, but {table.column(column).type}; tokenise first"
        )
    lengths = _lengths_of(tokens)
    check_not_empty(lengths)
    per_token = _columns_per_token(columns, lengths)
    _check_single(per_token, lengths)
    starts, lengths = _treat_too_long(lengths, max_length, too_long)
    plan = plan_packing(lengths, max_length)
    logger.info("%s", plan)
    return as_packed(datasets.Dataset(pa.table(_pack_columns(per_token, starts, plan))))


def _check_arguments(dataset: datasets.Dataset, column: str, too_long: str) -> None:
    import datasets

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


def _pack_columns(columns: Mapping[str, pa.Array], starts: Integers, plan: PackingPlan) -> dict[str, pa.Array]:
    """Returns the columns row by row, with the `position_ids` and `seq_lengths` of the rows.

    Args:
        columns: with a value per token.
        starts: (examples,): where each example of the plan begins among the tokens of a column.
        plan: which examples share a row.
    """
    import pyarrow as pa

    order = np.concatenate(plan.rows)
    lengths = plan.lengths[order]
    examples_per_row = np.array([len(row) for row in plan.rows])
    # Where each token of the packed rows comes from: its example's start, and how far into it.
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = pa.array(np.repeat(starts[order], lengths) + within)
    examples = np.concatenate(([0], np.cumsum(examples_per_row)))
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths)))[examples], pa.int64())
    packed = {
        name: pa.LargeListArray.from_arrays(offsets, each.flatten().take(source))
        for name, each in columns.items()
        if name not in ("position_ids", "attention_mask")
    }
    number = np.arange(len(order)) - np.repeat(examples[:-1], examples_per_row)  # of each example in its row
    seq_idx = np.repeat(number, lengths).astype(np.int32)
    for name, values in (("position_ids", within), ("seq_idx", seq_idx), ("attention_mask", seq_idx + 1)):
        packed[name] = pa.LargeListArray.from_arrays(offsets, pa.array(values))
    packed["seq_lengths"] = pa.LargeListArray.from_arrays(pa.array(examples, pa.int64()), pa.array(lengths))
    return packed


def _as_list_array(column: pa.ChunkedArray) -> pa.Array | None:
    """Returns one list array of numbers, or None if the column is something else."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column, kind = column.cast(pa.large_list(kind.value_type)), pa.large_list(kind.value_type)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    number_kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not any(is_kind(kind.value_type) for is_kind in number_kinds):
        return None
    return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)


def _columns_per_token(columns: Mapping[str, pa.Array | None], lengths: Integers) -> dict[str, pa.Array]:
    """Returns the columns with a value per token; the log names the others.

    Raises PadfreeError if a column that must have a value per token has another number somewhere.
    """
    per_token, others = {}, []
    for name, each in columns.items():
        if each is not None and np.array_equal(_lengths_of(each), lengths):
            per_token[name] = each
        elif each is not None and (name in PER_TOKEN or name.endswith("_mask")):
            example = int(np.argmax(_lengths_of(each) != lengths))
            raise PadfreeError(
                f"example {example} has {lengths[example]} tokens, but {_lengths_of(each)[example]} {name}; "
                "mend it, or leave the column out"
            )
        else:
            others.append(name)
    if others:
        logger.info("left out columns that have no value per token: %s", ", ".join(others))
    return per_token


def _check_single(columns: Mapping[str, pa.Array], lengths: Integers) -> None:
    """Raises PadfreeError for an example that is padded or holds several: packing would lose where they end."""
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


def _lengths_of(lists: pa.Array) -> Integers:
    return np.asarray(lists.value_lengths().fill_null(0)).astype(np.int64)


def _treat_too_long(lengths: Integers, most: int, too_long: str) -> tuple[Integers, Integers]:
    """Returns where examples start among all tokens, and their lengths, with those over `most` treated as asked."""
    starts = np.cumsum(lengths) - lengths
    over = lengths > most
    if not over.any() or too_long == "error":  # plan_packing refuses them
        return starts, lengths
    if too_long == "drop":
        logger.warning("left out %d of %d examples, %d tokens", over.sum(), len(lengths), lengths[over].sum())
        return starts[~over], lengths[~over]
    if too_long == "cut":
        beyond = (lengths[over] - most).sum()
        logger.warning("cut %d of %d examples, by %d tokens", over.sum(), len(lengths), beyond)
        return starts, np.minimum(lengths, most)
    return _split(starts, lengths, most)


def _split(starts: Integers, lengths: Integers, most: int) -> tuple[Integers, Integers]:
    """Returns starts and lengths of the examples after those over `most` are split into parts of `most` tokens."""
    over, parts = lengths > most, -(-lengths // most)
    logger.warning("split %d of %d examples into %d", over.sum(), len(lengths), parts[over].sum())
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    return np.repeat(starts, parts) + number * most, np.minimum(np.repeat(lengths, parts) - number * most, most)
