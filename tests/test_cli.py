"""The command line: each command works on a tiny model, prints text or one JSON object, and tells by its exit code."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from padfree_patch import cli
from padfree_patch.registry import registry


def run(*arguments):
    return CliRunner().invoke(cli.cli, arguments)


def test_verify_tells_by_its_exit_code():
    patched, unpatched = run("verify", "llama", "--tiny"), run("verify", "llama", "--tiny", "--unpatched")
    assert patched.exit_code == 0, patched.output
    assert "examples do not mix" in patched.output
    assert unpatched.exit_code == 1
    assert "EXAMPLES MIX" in unpatched.output


def test_explain_in_text_and_json():
    text, as_json = run("explain", "llama", "--tiny"), run("explain", "llama", "--tiny", "--json")
    assert text.exit_code == as_json.exit_code == 0
    assert "upstream alone: EXAMPLES MIX" in text.output
    assert "after apply: examples do not mix" in text.output
    found = json.loads(as_json.output)
    assert found["now"]["first_leak"] == "model.layers.0.self_attn"
    assert found["after"]["logit_change"] == 0
    assert found["backend"] == "sdpa"


def test_list_names_every_patch():
    assert [
        row["model_type"] for row in json.loads(run("list", "--json").output)["patches"]
    ] == registry().model_types()
    assert all(name in run("list").output for name in registry().model_types())


def test_bench_times_a_step():
    result = run("bench", "llama", "--tiny", "--steps", "1", "--batch-size", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert len(found["lengths"]) == 2
    assert set(found) == {"lengths", "padding_share", "padded_seconds", "packed_seconds", "ceiling_seconds"}
    assert min(found[f"{name}_seconds"] for name in ("padded", "packed", "ceiling")) > 0
    text = run("bench", "llama", "--tiny", "--steps", "1", "--batch-size", "2").output
    assert "of the ceiling" in text
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["padded", "padding-free", "ceiling"]


def test_errors_of_ours_are_printed_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["padfree-patch", "verify", "gpt2", "--tiny"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "padfree-patch: no patch for 'gpt2'; there are " in capsys.readouterr().err


def test_demo_is_a_command():
    from padfree_patch.demo.command import demo

    cli.cli.add_command(demo)
    assert "padded and padding-free" in run("demo", "--help").output
