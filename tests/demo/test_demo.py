"""The demo: runs, and fails if the two trainings are not the same."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from padfree_patch.demo import results
from padfree_patch.demo.command import demo
from padfree_patch.demo.compare import whole_file

pytest.importorskip("accelerate")
pytestmark = pytest.mark.xdist_group("demo")  # `finished` is made once, not by each of pytest's processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on a data file of one's own."""
    folder = tmp_path_factory.mktemp("demo")
    texts = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in (2, 30, 4, 17, 3, 9)]
    data = folder / "texts.jsonl"
    data.write_text("\n".join(map(json.dumps, texts)))
    options = ["--data", str(data), "--steps", "3", "--batch-size", "2", "--threads", "1", "--output", str(folder)]
    outcome = CliRunner().invoke(demo, [*options, "--json"])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout), folder


@pytest.mark.slow
def test_both_runs_are_the_same_training(finished):
    found, _ = finished
    assert found["ok"]
    padded, free = found["padded"], found["padding_free"]
    assert len(padded["losses"]) == len(free["losses"]) == 3
    assert max(abs(a - b) for a, b in zip(padded["losses"], free["losses"])) < 1e-4
    assert padded["real_tokens"] == free["real_tokens"] == free["row_tokens"]
    assert padded["padding_share"] > 0 == free["padding_share"]
    assert padded["probe"]["logit_change"] > 0 == free["probe"]["logit_change"]
    assert min(run[key] for run in (padded, free) for key in ("tokens_per_second", "peak_bytes")) > 0


@pytest.mark.slow
def test_picture_and_results_are_written(finished):
    found, folder = finished
    assert json.loads((folder / "results.json").read_text()) == found
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_different_trainings_are_a_problem(finished):
    found, _ = finished
    keep = {field.name for field in dataclasses.fields(results.Run)}
    padded, free = (
        results.Run.from_json({key: value for key, value in found[name].items() if key in keep})
        for name in ("padded", "padding_free")
    )
    assert results.Comparison({}, padded, free).problems() == []
    other = dataclasses.replace(free, losses=[free.losses[0], free.losses[1] + 1e-3, free.losses[2]])
    (problem,) = results.Comparison({}, padded, other).problems()
    assert "losses differ by 0.001 at step 2" in problem
    leaking = dataclasses.replace(free, probe=dataclasses.replace(free.probe, logit_change=0.5))
    assert "does not isolate its examples" in results.Comparison({}, padded, leaking).problems()[0]
    assert (
        "different batches" in results.Comparison({}, padded, dataclasses.replace(free, real_tokens=[1])).problems()[0]
    )


def test_unreadable_data_says_which_line(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"question": "a", "answer": "b"}\n')
    outcome = CliRunner().invoke(demo, ["--data", str(data), "--output", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "line 2" in outcome.output
    assert "question" in outcome.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda folder: {"--output": folder / "file" / "below"}, "is no folder that can be written to"),
        (lambda folder: {"--output": "a\0b"}, "is no folder that can be written to: embedded null byte"),
        (lambda folder: {"--data": "a\0b"}, "embedded null byte"),
        (lambda folder: {"--model": folder / "nothing"}, "nothing' cannot be used: there is no such folder"),
        (lambda folder: {"--seed": "-1"}, "-1 is not in the range"),
        (lambda folder: {"--steps": "0"}, "0 is not in the range"),
    ],
)
def test_what_cannot_be_used_is_a_line_and_exit_status_2(tmp_path, options, message):
    (tmp_path / "file").write_text("")
    given = {"--output": tmp_path / "out", **options(tmp_path)}
    outcome = CliRunner().invoke(demo, [str(each) for pair in given.items() for each in pair])
    assert outcome.exit_code == 2
    assert message in outcome.output.splitlines()[-1]


def test_results_are_written_whole_or_not_at_all(tmp_path):
    place = tmp_path / "results.json"
    with whole_file(place) as file:
        file.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(place) as file:
        file.write_text("ne")
        raise OSError("full")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]
