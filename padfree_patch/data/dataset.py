"""Packs a `datasets.Dataset` into rows of examples, with Arrow: no token is ever a Python object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ..arguments import Integers, whole_number
from ..errors import PadfreeError
from .boundary_columns import KEPT
from .packing_plan import check_not_empty, plan_packing
from .row_writer import Parts, as_dataset, packed_rows
from .token_columns import TokenColumn, check_no_nulls, read_columns

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("padfree_patch.dataset")  # the name that the docstring gives

PER_TOKEN = ("labels", "position_ids", "token_type_ids", "seq_idx")
"""Columns, beside masks, that have a value per token or are wrong."""

CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")

TOO_LONG = ("error", "cut", "split", "drop")

Faults: TypeAlias = tuple[tuple[npt.NDArray[np.bool_], str], ...]


def pack_dataset(
    dataset: datasets.Dataset, max_length: int, *, column: str = "input_ids", too_long: str = "error"
) -> datasets.Dataset:
    """Packs examples into rows of at most `max_length` tokens, by best-fit decreasing (`plan_packing`).

    Every list column that is as long as `column` in each example (labels, masks) is joined row by row; other columns
    are left out, and the log warns which. Five columns say where examples end, whichever of them a Trainer keeps:
    `position_ids` that restart at every example, its number in `seq_idx` (from 0) and in `attention_mask` (from 1),
    `seq_lengths`, TRL's name, with the tokens of each, and `label_ids`, which every Trainer keeps, with the same
    numbers below zero. The collators read any of them; taking away the last one is an error, until the rows were saved
    or mapped. No example is divided and no token lost, unless `too_long` asks for it; then the log says how many
    (logger padfree_patch.dataset). With TRL's `completion_mask` or `assistant_masks` the rows have `labels` in which
    what a mask leaves out is -100.

    Rows are made some at a time. Those of a data set that is on disk go to a cache file beside its own, as `map`'s do,
    unless `datasets.disable_caching` was called.

    Args:
        dataset: tokenised, not padded.
        max_length: tokens that a row holds at most.
        column: the column that holds the tokens.
        too_long: what to do with an example that has more than `max_length` tokens. "error"; "cut" its end; "split" it
            into examples of `max_length`, and a rest; or "drop" it.

    Raises PadfreeError if this is no `datasets.Dataset`, has a transform, has no such column or is packed already, if
    an example is empty, padded or too long, or has nulls, labels for the whole example, or labels or a mask of another
    length, or if the rows cannot be written.
    """
    from .packed_rows import as_packed

    max_length = whole_number(max_length, "max_length", 1)
    _check_arguments(dataset, column, too_long)
    columns = read_columns(dataset)
    tokens = columns[column]
    kind = dataset.data.table.column(column).type
    if tokens is None or "int" not in str(kind.value_type):
        raise PadfreeError(f"column {column!r} holds no lists of integers, but {kind}; tokenise first")
    check_not_empty(tokens.length)
    per_token = _columns_per_token(columns, tokens.length)
    _check_single(per_token, columns)
    parts = _treat_too_long(tokens.length, max_length, too_long)
    plan = plan_packing(parts.lengths, max_length)
    logger.info("%s", plan)
    rows = packed_rows(per_token, tokens, parts, plan)
    return as_packed(as_dataset(rows, dataset, arguments=(max_length, column, too_long)), column)


def _check_arguments(dataset: datasets.Dataset, column: str, too_long: str) -> None:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise PadfreeError(
            f"pack_dataset takes a datasets.Dataset, found {type(dataset).__name__}; pack each split by itself, and a "
            "stream with TokenBudgetBatchSampler or the collator's max_tokens"
        )
    if dataset.format["type"] == "custom":
        raise PadfreeError(
            "the dataset has a transform (set_transform or with_transform), which packing would leave out; apply it "
            "with dataset.map first, or take it off with dataset.reset_format()"
        )
    if "seq_lengths" in dataset.column_names:
        raise PadfreeError("the dataset is packed already: its rows have seq_lengths")
    if KEPT in dataset.column_names:
        raise PadfreeError(f"packed rows say in {KEPT} where their examples end: rename the column (labels?)")
    if not isinstance(too_long, str) or too_long not in TOO_LONG:
        raise PadfreeError(f"too_long={too_long!r}; choose one of {', '.join(TOO_LONG)}")
    if not isinstance(column, str) or column not in dataset.column_names:
        raise PadfreeError(f"no column {column!r} to pack by; the dataset has {', '.join(dataset.column_names)}")


def _columns_per_token(columns: Mapping[str, TokenColumn | None], lengths: Integers) -> dict[str, TokenColumn]:
    """Returns the columns with a value per token; the log names the others.

    Raises PadfreeError if a column that must have a value per token has another number somewhere, or a null.
    """
    per_token, others = {}, []
    for name, each in columns.items():
        must_be = name in PER_TOKEN or name.endswith(("_mask", "_masks"))
        if each is not None and np.array_equal(each.length, lengths):
            check_no_nulls(name, each)
            per_token[name] = each
        elif each is not None and must_be:
            example = int(np.argmax(each.length != lengths))
            raise PadfreeError(
                f"example {example} has {lengths[example]} tokens, but {each.length[example]} {name}; "
                "mend it, or leave the column out"
            )
        elif must_be:
            raise PadfreeError(
                f"column {name!r} must have a list with a number per token in each example. A value for the whole "
                "example, such as a label of classification, cannot be packed: rename or remove the column"
            )
        else:
            others.append(name)
    if others:
        logger.warning("left out columns that have no value per token: %s; remove_columns() first", ", ".join(others))
    return per_token


def _check_single(per_token: Mapping[str, TokenColumn], columns: Mapping[str, TokenColumn | None]) -> None:
    """Raises PadfreeError for an example that is padded or holds several: packing would lose where they end."""
    for name, faults in FAULTS.items():
        for examples, values in per_token[name].batches() if name in per_token else ():
            owner = np.repeat(examples, per_token[name].length[examples])
            numbers = np.asarray(values).astype(np.int64)
            for wrong, what in faults(numbers, owner):
                if wrong.any():
                    example = owner[np.argmax(wrong)]
                    raise PadfreeError(f"example {example} {what}; pack_dataset takes examples one by one, unpadded")
    for name in CUMULATIVE:
        if (each := columns.get(name)) is not None and (several := each.length > 2).any():
            example = int(np.argmax(several))
            raise PadfreeError(
                f"example {example} holds several examples (its {name}); pack_dataset takes them one by one"
            )


def _mask_faults(values: Integers, owner: Integers) -> Faults:
    return (values == 0, "is padded"), (values > 1, "holds several examples (segments in its mask)")


def _position_faults(values: Integers, owner: Integers) -> Faults:
    what = "holds several examples, or jumps (its position_ids do not go up by one)"
    return (((np.diff(values) != 1) & (np.diff(owner) == 0), what),)


def _number_faults(values: Integers, owner: Integers) -> Faults:
    return (((np.diff(values) != 0) & (np.diff(owner) == 0), "holds several examples (its seq_idx changes)"),)


FAULTS = {"attention_mask": _mask_faults, "position_ids": _position_faults, "seq_idx": _number_faults}
"""What is wrong at a value of a column, by a function of the values of some examples and which example each is of."""


def _treat_too_long(lengths: Integers, most: int, too_long: str) -> Parts:
    """Returns the parts of the examples to be packed, with those over `most` treated as asked.

    Raises PadfreeError if there are some, and no treatment was asked for.
    """
    everything = Parts(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    over = lengths > most
    if not over.any():
        return everything
    if too_long == "error":
        raise PadfreeError(
            f"{over.sum()} of {len(lengths)} examples have more than max_length={most} tokens, example "
            f"{lengths.argmax()} has {lengths.max()}; pass a larger max_length, or too_long='cut', 'split' or 'drop'"
        )
    if too_long == "drop":
        logger.warning("left out %d of %d examples, %d tokens", over.sum(), len(lengths), lengths[over].sum())
        return Parts(*(each[~over] for each in (everything.examples, everything.offsets, lengths)))
    if too_long == "cut":
        beyond = (lengths[over] - most).sum()
        logger.warning("cut %d of %d examples, by %d tokens", over.sum(), len(lengths), beyond)
        return Parts(everything.examples, everything.offsets, np.minimum(lengths, most))
    return _split(lengths, most)


def _split(lengths: Integers, most: int) -> Parts:
    """Returns the examples, those over `most` in parts of `most` tokens and a rest."""
    over, parts = lengths > most, -(-lengths // most)
    logger.warning("split %d of %d examples into %d", over.sum(), len(lengths), parts[over].sum())
    offsets = (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)) * most
    return Parts(
        np.repeat(np.arange(len(lengths)), parts), offsets, np.minimum(np.repeat(lengths, parts) - offsets, most)
    )
