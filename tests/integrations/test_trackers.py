"""The callback's figures in what transformers shows by itself: TensorBoard, and the table of a notebook."""

from __future__ import annotations

import sys
import types

import pytest

from helpers.training import flattening, trainer_of
from padfree_patch import PaddingFreeCallback, apply

pytestmark = pytest.mark.versions

FIGURES = ["tokens_per_second", "padding_saved", "sequences_per_row", "longest_row", "peak_memory_gib"]


class Writer:
    """Stands in for TensorBoard's."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append(name)

    def add_text(self, *args):
        pass

    flush = close = add_text


def test_tensorboard_is_told(llama, tmp_path):
    from transformers.integrations import TensorBoardCallback

    board = TensorBoardCallback.__new__(TensorBoardCallback)  # its __init__ wants the package
    board.tb_writer, board._SummaryWriter, board.logging_dir = Writer(), None, str(tmp_path)
    trainer = trainer_of(apply(llama), tmp_path, flattening())
    trainer.add_callback(board)
    trainer.add_callback(PaddingFreeCallback())
    writer = board.tb_writer
    trainer.train()
    assert all(writer.written.count(f"train/{name}") == 3 for name in FIGURES)


@pytest.mark.parametrize("evaluates", [False, True])
def test_notebook_shows_the_figures(llama, tmp_path, evaluates, monkeypatch):
    display = types.SimpleNamespace(HTML=str, display=lambda *args, **options: types.SimpleNamespace(update=print))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    sys.modules["IPython"].display = display
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    tables = []

    class Notebook(NotebookProgressCallback):
        def on_train_end(self, *args, **options):
            tables.append(self.training_tracker.inner_table)
            super().on_train_end(*args, **options)

    when = {}
    if evaluates:
        import dataclasses

        from transformers import TrainingArguments

        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        when = {"eval_strategy" if "eval_strategy" in names else "evaluation_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(apply(llama), tmp_path, flattening(), **when)
    trainer.add_callback(Notebook())
    trainer.add_callback(PaddingFreeCallback())
    trainer.train()
    ((columns, *lines),) = tables
    assert set(FIGURES) <= set(columns) and len(lines) == 3
    assert all(line[columns.index("sequences_per_row")] == 4 for line in lines)
