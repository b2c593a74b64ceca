"""Makes the rows of a packed data set, some at a time, and keeps them as the data set that they come from is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import Integers
from ..batch.labels import IGNORED_LABEL
from ..errors import PadfreeError
from .boundary_columns import KEPT
from .fields import LABEL_MASKS
from .packing_plan import PackingPlan
from .token_columns import TokenColumn, groups

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is packed: parts of examples, mostly whole ones."""

    examples: Integers
    """(parts,): the example of each."""
    offsets: Integers
    """(parts,): tokens of the example before it."""
    lengths: Integers
    """(parts,): its tokens."""


def packed_rows(
    columns: Mapping[str, TokenColumn], tokens: TokenColumn, parts: Parts, plan: PackingPlan
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a plan, some at a time, with what says where their examples end.

    Args:
        columns: with a value per token.
        tokens: the one of them that holds the tokens, which are the labels where no column has labels.
        parts: what the plan's indices mean.
        plan: which parts share a row.
    """
    order = np.concatenate(plan.rows)
    parts_of_row = np.array([len(row) for row in plan.rows])
    first = np.concatenate(([0], np.cumsum(parts_of_row)))  # of each row, among `order`
    row_lengths = np.add.reduceat(plan.lengths[order], first[:-1])
    for begin, end in groups(row_lengths):
        chosen = order[first[begin] : first[end]]
        some = Parts(parts.examples[chosen], parts.offsets[chosen], parts.lengths[chosen])
        yield _batch_of_rows(columns, tokens, some, parts_of_row[begin:end])


def _batch_of_rows(
    columns: Mapping[str, TokenColumn], tokens: TokenColumn, parts: Parts, parts_of_row: Integers
) -> pa.RecordBatch:
    import pyarrow as pa

    examples = np.concatenate(([0], np.cumsum(parts_of_row)))
    offsets = pa.array(np.concatenate(([0], np.cumsum(parts.lengths)))[examples], pa.int32())
    values = {name: each.gather(parts.examples, parts.offsets, parts.lengths) for name, each in columns.items()}
    if masks := [values[name] for name in LABEL_MASKS if name in values]:
        labels = values.get("labels")
        labels = tokens.gather(parts.examples, parts.offsets, parts.lengths) if labels is None else labels
        values["labels"] = _masked(labels, masks)
    number = np.arange(len(parts.lengths), dtype=np.int32) - np.repeat(examples[:-1], parts_of_row).astype(np.int32)
    values["position_ids"] = pa.array(_positions(parts.lengths))
    values["seq_idx"] = pa.array(np.repeat(number, parts.lengths))
    values["attention_mask"] = pa.array(np.repeat(number + 1, parts.lengths))
    # Lists of 32 bits: datasets before 2.20 knows no others, and a batch of rows is far from 2**31 tokens.
    lists = {name: pa.ListArray.from_arrays(offsets, each) for name, each in values.items()}
    of_rows = pa.array(examples, pa.int32())
    lists["seq_lengths"] = pa.ListArray.from_arrays(of_rows, pa.array(parts.lengths))
    lists[KEPT] = pa.ListArray.from_arrays(of_rows, pa.array(-parts.lengths))
    return pa.RecordBatch.from_arrays(list(lists.values()), names=list(lists))


def _positions(lengths: Integers) -> Integers:
    """Returns 0, 1, 2, ... restarting at every example."""
    steps = np.ones(lengths.sum(), dtype=np.int64)
    steps[0] = 0
    steps[np.cumsum(lengths[:-1])] = 1 - lengths[:-1]
    return np.cumsum(steps, out=steps)


def _masked(labels: pa.Array, masks: list[pa.Array]) -> pa.Array:
    """Returns labels, int64, that are ignored where a mask has a 0."""
    import pyarrow as pa

    found = np.asarray(labels).astype(np.int64)
    for mask in masks:
        found[np.asarray(mask) == 0] = IGNORED_LABEL
    return pa.array(found)


def as_dataset(
    rows: Iterator[pa.RecordBatch], source: datasets.Dataset, *, arguments: tuple[object, ...]
) -> datasets.Dataset:
    """Makes a data set of rows: in a cache file beside that of the source, or in memory if the source is there.

    Args:
        rows: some at a time.
        source: the data set that they come from.
        arguments: what the rows depend on besides the source; they make the name of the file.

    Raises PadfreeError if the file cannot be written; none is left then.
    """
    import datasets
    import pyarrow as pa

    folder = Path(source.cache_files[0]["filename"]).parent if source.cache_files else None
    fingerprint = hashlib.sha256(repr((source._fingerprint, *arguments)).encode()).hexdigest()[:16]
    if folder is None or not datasets.is_caching_enabled() or not os.access(folder, os.W_OK):
        # Without a fingerprint, datasets would hash, and for that copy, all that is in memory.
        return datasets.Dataset(pa.Table.from_batches(list(rows)), fingerprint=fingerprint)
    file = folder / f"cache-padfree-{fingerprint}.arrow"  # so named, `cleanup_cache_files` finds it
    _write(rows, file)
    return datasets.Dataset.from_file(str(file))


def _write(rows: Iterator[pa.RecordBatch], file: Path) -> None:
    """Writes rows as datasets reads them; the file is there at once and whole, or not at all."""
    import pyarrow as pa

    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}")  # other processes may write the same rows
    try:
        batch = next(rows)
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            while batch is not None:
                writer.write_batch(batch)
                del batch  # before the next one is made
                batch = next(rows, None)
        unfinished.replace(file)
    except OSError as error:
        raise PadfreeError(f"the packed rows cannot be written to {file}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
