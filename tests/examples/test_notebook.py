"""examples/tour.ipynb: its code runs in order, and what a kernel left of its last run (`nox -s docs`) is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_cells_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(CELLS):
        *lines, last = "".join(cell["source"]).splitlines()
        if last.endswith(".plot()"):  # which the notebook shows
            exec("\n".join(lines), names)
            figure = eval(last, names)
            assert isinstance(figure, Figure)
            assert ("EXAMPLES MIX" in figure.axes[0].get_title()) is (number == 1)  # before apply: the control
        else:
            exec("\n".join([*lines, last]), names)
    logs = [each for each in names["trainer"].state.log_history if "padding_saved" in each]
    assert len(logs) == 5 and all(each["padding_saved"] > 0.3 for each in logs)


def test_what_the_kernel_left_is_whole():
    """Pictures, and the Trainer's table with the callback's figures; no error, and every cell was run, in order."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    data = [set(output.get("data", {})) for cell in CELLS for output in cell["outputs"]]
    assert sum("image/png" in each for each in data) == 2
    html = "".join("".join(o.get("data", {}).get("text/html", "")) for cell in CELLS for o in cell["outputs"])
    assert "tokens_per_second" in html and "padding_saved" in html
    assert not [output for cell in CELLS for output in cell["outputs"] if output["output_type"] == "error"]
