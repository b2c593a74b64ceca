"""pack_dataset: every example whole in one row, what is lost an error or logged, and little memory taken."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from padfree_patch import DataCollatorWithFlattening, PadfreeError, pack_dataset, plan_packing

BOUNDARIES = ("position_ids", "seq_idx", "attention_mask", "seq_lengths", "label_ids")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("labels", [[-100, 2, 3], [5]], "example 1 has 2 tokens, but 1 labels"),
        ("labels", [[-100, 2, 3], None], "example 1 has 2 tokens, but 0 labels"),
        ("completion_mask", [[0, 1], [0, 1]], "example 0 has 3 tokens, but 2 completion_mask"),
        ("attention_mask", [[1, 1, 1], [1, 0]], "example 1 is padded"),
        ("attention_mask", [[1, 1, 2], [1, 1]], "example 0 holds several examples"),
        ("position_ids", [[0, 1, 2], [0, 0]], "example 1 holds several examples"),
        ("position_ids", [[0, 1, 9], [0, 1]], r"example 0 .* or jumps \(its position_ids do not go up by one\)"),
        ("label_ids", [[5, 5, 5], [5, 5]], "packed rows say in label_ids where their examples end: rename"),
        ("input_ids", [[1, 2, 3], []], "example 1 has 0 tokens"),
        ("input_ids", [[1, 2, 3], [4, None]], "example 1 has a null among its input_ids"),
        ("labels", [[1, None, 3], [4, 5]], "example 0 has a null among its labels"),
        ("input_ids", [[1.0, 2.0, 3.0], [4.0, 5.0]], "column 'input_ids' holds no lists of integers"),
        ("labels", [0, 1], "column 'labels' must have a list .* such as a label of classification"),
        ("assistant_masks", [[0, 1], [0, 1]], "example 0 has 3 tokens, but 2 assistant_masks"),
        ("seq_idx", [[0, 0, 1], [0, 0]], r"example 0 holds several examples \(its seq_idx changes\)"),
        ("cu_seq_lens_q", [[0, 2, 3], [0, 2]], r"example 0 holds several examples \(its cu_seq_lens_q\)"),
    ],
)
def test_what_packing_would_lose_is_an_error(column, values, message):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], column: values})
    for too_long in ("error", "split", "drop"):
        with pytest.raises(PadfreeError, match=message):
            pack_dataset(dataset, 8, too_long=too_long)


def test_masks_and_lists_of_one_size_are_joined(caplog):
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "completion_mask": datasets.Sequence(datasets.Value("bool")),
            "labels": datasets.Sequence(datasets.Value("int64"), length=2),
            "vector": datasets.Sequence(datasets.Value("float32"), length=4),
        }
    )
    rows = [
        {"input_ids": [i, i], "completion_mask": [False, True], "labels": [-100, i], "vector": [0] * 4} for i in (1, 2)
    ]
    with caplog.at_level(logging.INFO, "padfree_patch.dataset"):
        packed = pack_dataset(datasets.Dataset.from_list(rows, features=features), 4)
    assert packed[0]["completion_mask"] == [False, True] * 2
    assert packed[0]["labels"] == [-100, 1, -100, 2]
    assert "vector" not in packed.column_names and "vector" in caplog.text


def dataset_of(lengths):
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)],
            "labels": [[-(100 * i + j) for j in range(n)] for i, n in enumerate(lengths)],
            "text": [str(n) for n in lengths],
        }
    )


def examples_in(packed, name="input_ids"):
    """Every example of a packed data set, in the order of its first token."""
    found = []
    for row in packed:
        ends = np.cumsum(row["seq_lengths"])
        found += [row[name][end - length : end] for end, length in zip(ends, row["seq_lengths"])]
        restarts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert restarts == [end - length for end, length in zip(ends, row["seq_lengths"])]
    return sorted(found, key=lambda each: abs(each[0]))


def test_packed_data_set_holds_every_example_whole():
    lengths = [5, 3, 7, 2, 8, 1, 4]
    data = dataset_of(lengths)
    packed = pack_dataset(data, 8)
    assert set(packed.column_names) == {"input_ids", "labels", *BOUNDARIES}
    assert max(len(row) for row in packed["input_ids"]) <= 8
    assert len(packed) == len(plan_packing(lengths, 8).rows)
    assert examples_in(packed) == data["input_ids"][:]
    assert examples_in(packed, "labels") == data["labels"][:]
    selected = data.select([2, 4, 0])  # with Arrow's indices mapping
    assert examples_in(pack_dataset(selected, 8)) == [data[i]["input_ids"] for i in (0, 2, 4)]


@pytest.mark.parametrize("kept", [*((name,) for name in BOUNDARIES), BOUNDARIES])
def test_collator_finds_the_examples_of_packed_rows_again(kept):
    """A Trainer leaves the columns that its model's forward names."""
    packed = pack_dataset(dataset_of([5, 3, 7, 2, 8, 1, 4]), 8).select_columns(["input_ids", "labels", *kept])
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([packed[0], packed[1], packed[2]])
    expected = [
        n for row in plan_packing([5, 3, 7, 2, 8, 1, 4], 8).rows[:3] for n in (np.array([5, 3, 7, 2, 8, 1, 4])[row])
    ]
    assert list(batch["packed_sequences"].lengths) == expected
    assert (batch["labels"] == -100).sum() == len(expected)


@pytest.mark.parametrize(
    ("too_long", "expected", "logged"),
    [
        ("cut", [[0, 1, 2, 3], [100, 101]], "cut 1 of 2 examples, by 5 tokens"),
        ("drop", [[100, 101]], "left out 1 of 2 examples, 9 tokens"),
        ("split", [[0, 1, 2, 3], [4, 5, 6, 7], [8], [100, 101]], "split 1 of 2 examples into 3"),
    ],
)
def test_too_long_examples_are_treated_as_asked_and_counted(caplog, too_long, expected, logged):
    with caplog.at_level(logging.INFO, "padfree_patch.dataset"):
        packed = pack_dataset(dataset_of([9, 2]), 4, too_long=too_long)
    assert examples_in(packed) == expected
    assert logged in caplog.text


def test_data_that_cannot_be_packed_is_an_error():
    data = dataset_of([9, 2])
    with pytest.raises(PadfreeError, match=r"have more than max_length=4 tokens, example 0 has 9; .* too_long='cut'"):
        pack_dataset(data, 4)
    with pytest.raises(PadfreeError, match="no column 'tokens' to pack by; the dataset has input_ids, labels, text"):
        pack_dataset(data, 9, column="tokens")
    with pytest.raises(PadfreeError, match="column 'text' holds no lists"):
        pack_dataset(data, 9, column="text")
    with pytest.raises(PadfreeError, match="too_long='wrap'"):
        pack_dataset(data, 9, too_long="wrap")
    with pytest.raises(PadfreeError, match="example 1 has 0 tokens"):
        pack_dataset(dataset_of([9, 0]), 9)
    with pytest.raises(PadfreeError, match="packed already"):
        pack_dataset(pack_dataset(data, 9), 9)
    with pytest.raises(PadfreeError, match="found IterableDataset"):
        pack_dataset(data.to_iterable_dataset(), 9)


@pytest.mark.parametrize("max_length", [None, 2.5, -1, 0, "8", float("nan")])
def test_max_length_must_be_a_number_of_tokens(max_length):
    with pytest.raises(PadfreeError, match="max_length must be a whole number, 1 or more, found"):
        pack_dataset(dataset_of([3]), max_length)


def test_a_transform_is_not_left_out_in_silence():
    data = dataset_of([3, 2])
    with pytest.raises(PadfreeError, match=r"has a transform .* apply it with dataset.map first"):
        pack_dataset(data.with_transform(lambda rows: {name: each[::-1] for name, each in rows.items()}), 8)
    assert examples_in(pack_dataset(data.with_format("torch"), 8)) == data["input_ids"][:]  # the control


@pytest.mark.parametrize("with_labels", [False, True])
def test_labels_of_the_rows_leave_out_what_trls_masks_leave_out(with_labels):
    """The plain Trainer removes the masks before a collator could read them."""
    columns = {"input_ids": [[1, 2, 3], [4, 5]], "completion_mask": [[0, 1, 1], [0, 1]]}
    columns |= {"assistant_masks": [[0, 0, 1], [1, 1]]}
    columns |= {"labels": [[7, 8, 9], [-100, 6]]} if with_labels else {}
    packed = pack_dataset(datasets.Dataset.from_dict(columns), 8)
    assert packed[0]["labels"] == [-100, -100, 9 if with_labels else 3, -100, 6 if with_labels else 5]
    assert packed[0]["completion_mask"] == [0, 1, 1, 0, 1]
    del columns["completion_mask"], columns["assistant_masks"]
    unmasked = pack_dataset(datasets.Dataset.from_dict(columns), 8)[0]  # the control
    assert unmasked.get("labels") == (columns.get("labels") and [7, 8, 9, -100, 6])


@pytest.fixture
def on_disk(tmp_path):
    """A data set in two files, of more tokens than are written at once."""
    halves = []
    tokens = pa.array(np.arange(101 * 8000) % 101)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(8001) * 101, pa.int32()), tokens)
    for name in ("one", "two"):
        datasets.Dataset(pa.table({"input_ids": lists, "labels": lists})).save_to_disk(str(tmp_path / name))
        halves.append(datasets.load_from_disk(str(tmp_path / name)))
    return datasets.concatenate_datasets(halves)


def test_rows_of_a_data_set_on_disk_are_streamed_to_disk(on_disk):
    """Arrow and numpy together hold less than two of the batches that are written."""
    kept, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        packed = pack_dataset(on_disk, 4096)
        peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(kept)
    batches = packed.data.table.to_batches()
    assert len(batches) > 1 and packed.cache_files
    assert peak < 2 * max(batch.nbytes for batch in batches)
    in_memory = pack_dataset(datasets.Dataset(on_disk.data.table), 4096)
    assert in_memory.data.table.equals(packed.data.table) and not in_memory.cache_files
    assert pack_dataset(on_disk.select(range(3)), 4096)["input_ids"][:] == [list(range(101)) * 3]


def test_rows_that_cannot_be_written_leave_nothing_behind(on_disk, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    data = on_disk.select(range(5))
    before = set(Path(data.cache_files[0]["filename"]).parent.iterdir())
    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(PadfreeError, match=r"the packed rows cannot be written to .*No space left"):
        pack_dataset(data, 4096)
    assert set(Path(data.cache_files[0]["filename"]).parent.iterdir()) == before


@pytest.mark.parametrize("later", ["as it is", "shuffle", "select", "filter", "train_test_split"])
def test_packed_rows_cannot_lose_where_their_examples_end(later):
    packed = pack_dataset(dataset_of([5, 3, 7, 2, 8, 1, 4]), 8)
    arguments = {"select": [[0, 2]], "filter": [lambda row: True], "train_test_split": [0.5]}
    changed = packed if later == "as it is" else getattr(packed, later)(*arguments.get(later, []))
    rows = changed["train"] if later == "train_test_split" else changed
    with pytest.raises(PadfreeError, match="left would be input_ids, labels, and each row would be one text"):
        rows.remove_columns(list(BOUNDARIES))
    with pytest.raises(PadfreeError, match="would be one text: keep one of them"):
        rows.select_columns(["input_ids"])
    assert rows.remove_columns(list(BOUNDARIES[1:])).column_names == ["input_ids", "labels", "position_ids"]
    assert rows.select_columns(["labels"]).column_names == ["labels"]  # the control: no tokens, so no text


def test_rows_of_another_tokens_column_cannot_lose_where_their_examples_end():
    packed = pack_dataset(dataset_of([5, 3, 7]).rename_column("input_ids", "tokens"), 8, column="tokens")
    for rows in (packed, packed.select([0]), packed.rename_column("tokens", "input_ids")):
        with pytest.raises(PadfreeError, match="would lose the columns that say where their examples end"):
            rows.remove_columns(list(BOUNDARIES))


def saved(rows, folder):
    rows.save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def parquet(rows, folder):
    rows.to_parquet(str(folder / "rows.parquet"))
    return datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder))


@pytest.mark.parametrize(
    "later",
    [
        saved,
        parquet,
        lambda rows, _: rows.map(lambda row: {"more": 1}),
        lambda rows, _: datasets.concatenate_datasets([rows, rows]),
        lambda rows, _: rows.with_format("torch"),
        lambda rows, _: rows.to_iterable_dataset(),
    ],
    ids=["saved", "parquet", "map", "concatenate", "torch", "iterable"],
)
def test_what_every_trainer_keeps_says_where_examples_end(tmp_path, later):
    """`label_ids` is the one name beside the labels that no Trainer removes, whatever the model's forward names."""
    packed = pack_dataset(dataset_of([5, 3, 7]), 8)
    found = list(later(packed, tmp_path))[1]
    batch = DataCollatorWithFlattening()([{name: found[name] for name in ("input_ids", "labels", "label_ids")}])
    assert batch["position_ids"].tolist() == [[*range(5), *range(3)]]
    alone = DataCollatorWithFlattening()([{"input_ids": found["input_ids"]}])  # the control
    assert alone["position_ids"].tolist() == [[*range(8)]]


@pytest.mark.parametrize("labels", [[-100] * 3, [1, 1, 1], [-1, -1], 1], ids=str)
def test_label_ids_of_others_are_named_as_left_out(labels):
    with pytest.warns(UserWarning, match="leaves out label_ids"):
        batch = DataCollatorWithFlattening()([{"input_ids": [1, 2, 3], "label_ids": labels}])
    assert batch["position_ids"].tolist() == [[0, 1, 2]]
