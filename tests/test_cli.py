"""The command line: each command works on a tiny model, prints text or one JSON object, and tells by its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

import padfree_patch
from helpers.any_decoder import tiny_decoder
from padfree_patch import cli
from padfree_patch.measure.texts import train_tokenizer
from padfree_patch.registry import registry
from padfree_patch.testing import TINY


def no_network(*_, **__):
    raise ConnectionError("no network")


def run(*arguments):
    return CliRunner().invoke(cli.cli, arguments)


def test_verify_tells_by_its_exit_code():
    patched, unpatched = run("verify", "llama", "--tiny"), run("verify", "llama", "--tiny", "--unpatched")
    assert patched.exit_code == 0, patched.output
    assert "examples do not mix" in patched.output
    assert unpatched.exit_code == 1
    assert "EXAMPLES MIX" in unpatched.output


def test_verify_looks_for_the_way_as_apply_does(tmp_path):
    """BART's decoder needs a module that only the check names; the control is the first way, unchecked."""
    tiny_decoder("bart").save_pretrained(tmp_path)
    assert run("verify", str(tmp_path)).exit_code == 0
    with pytest.warns(UserWarning, match="only a check says"):
        assert not padfree_patch.verify(padfree_patch.apply(tiny_decoder("bart"), verify=False))


def test_explain_in_text_and_json():
    text, as_json = run("explain", "llama", "--tiny"), run("explain", "llama", "--tiny", "--json")
    assert text.exit_code == as_json.exit_code == 0
    assert "upstream alone, model(**batch): EXAMPLES MIX" in text.output
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
    times = {name: found.pop(f"{name}_seconds") for name in ("padded", "packed", "ceiling")}
    assert min(times.values()) > 0
    assert found.pop("speedup") == times["padded"] / times["packed"]
    assert found.pop("ceiling_ratio") == times["ceiling"] / times["packed"]
    assert set(found) == {"lengths", "padding_share"}
    text = run("bench", "llama", "--tiny", "--steps", "1", "--batch-size", "2").output
    assert "of the ceiling" in text
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["padded", "padding-free", "ceiling"]


def test_errors_of_ours_are_printed_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["padfree-patch", "verify", "gpt2", "--tiny"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "padfree-patch: no patch for 'gpt2'; there are " in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file of texts, a tokenizer, and one whose tokenizer.json is damaged."""
    place = tmp_path_factory.mktemp("cli")
    (place / "data.jsonl").write_text('{"prompt": "one", "completion": "two"}\n' * 4)
    for name in ("tokenizer", "odd"):
        train_tokenizer(["one two"], vocab_size=300).save_pretrained(place / name)
    (place / "odd" / "tokenizer.json").write_text("{}")
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 1, "num_labels": 3})
    LlamaForSequenceClassification(config).save_pretrained(place / "classifier")
    LlamaModel(config).save_pretrained(place / "decoder")
    return place


@pytest.mark.parametrize(("name", "cls"), [("classifier", "LlamaForSequenceClassification"), ("decoder", "LlamaModel")])
def test_a_model_is_loaded_as_what_it_was_saved_from(folder, name, cls):
    """A language model made of it would have a random head, which upstream says with a warning."""
    assert json.loads(run("verify", str(folder / name), "--json").stdout)["model"] == cls


def test_bench_gives_no_model_a_random_head(folder):
    refused = run("bench", str(folder / "classifier")).exception
    assert isinstance(refused, padfree_patch.PadfreeError)
    assert "bench trains a language model, and LlamaForSequenceClassification in " in str(refused)


def test_what_is_not_there_is_said_before_torch_is_imported(folder):
    commands = [
        ["verify", str(folder / "nothing")],
        ["bench", "nobody/nothing"],
        estimate_options(folder, **{"--tokenizer": folder / "nothing"}),
    ]
    program = f"""
import sys
from padfree_patch.cli import cli
from padfree_patch.errors import PadfreeError
for command in {commands}:
    try:
        cli(command, standalone_mode=False)
    except PadfreeError as error:
        print(error)
    assert "torch" not in sys.modules
"""
    text, seconds = own_process("-c", program)
    assert text.count("there is no such folder") == len(commands)
    assert seconds < 2


def estimate_options(folder, **changed):
    options = {"--data": folder / "data.jsonl", "--tokenizer": folder / "tokenizer", "--batch-size": 2, **changed}
    return ["estimate", *(str(each) for pair in options.items() for each in pair)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda folder: estimate_options(folder, **{"--data": "a\0b"}), "embedded null byte"),
        (lambda folder: estimate_options(folder, **{"--data": folder / "nothing"}), "nothing' cannot be read as JSON"),
        (lambda folder: estimate_options(folder, **{"--tokenizer": folder / "odd"}), "no tokenizer can be loaded from"),
        (lambda folder: estimate_options(folder, **{"--tokenizer": folder / "nothing"}), "there is no such folder"),
        (lambda folder: estimate_options(folder, **{"--max-length": 0}), "0 is not in the range x>=1"),
        (lambda _: ["bench", "--tiny", "llama", "--steps", "0"], "0 is not in the range x>=1"),
        (lambda _: ["bench", "--tiny", "llama", "--batch-size", "0"], "0 is not in the range x>=1"),
        (lambda folder: ["verify", str(folder / "nothing")], "there is no such folder"),
        (lambda folder: ["explain", str(folder / "data.jsonl")], "it is a file, not a folder"),
        (lambda folder: ["explain", str(folder)], "no model can be loaded from"),
        (lambda _: ["verify", "a\0b"], "nothing on the hub can have this name"),
        (lambda _: ["bench", "nobody/nothing"], "the hub can't be asked: ConnectionError: no network"),
        (lambda _: ["verify", "--tiny", "llama", "--attn", "nope"], "no tiny llama can be made for --attn nope"),
    ],
)
def test_what_cannot_be_used_is_a_line_and_exit_status_2(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr("sys.argv", ["padfree-patch", *arguments(folder)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and "Traceback" not in error
    assert error.startswith(("Usage:", "padfree-patch: ")) and (error.count("\n") == 1 or error.startswith("Usage:"))


def own_process(*arguments):
    """Runs Python, and returns what it printed and the CPU seconds that it took."""
    before = os.times()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, seconds


def test_help_is_quick_and_no_summary_is_cut_off():
    (text, first), (_, second) = (own_process("-m", "padfree_patch", "--help") for _ in range(2))
    assert min(first, second) < 0.4
    summaries = text.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in summaries if line] == sorted(cli.cli.commands)
    assert not [line for line in summaries if line.endswith("...")]


def test_no_help_imports_torch():
    program = f"""
import sys
from padfree_patch.cli import cli
for name in {sorted(cli.cli.commands)}:
    cli([name, "--help"], standalone_mode=False)
    assert "torch" not in sys.modules, name
"""
    assert own_process("-c", program)[0].count("Usage:") == len(cli.cli.commands)


def test_version_says_the_version():
    assert run("--version").output.split()[-1] == padfree_patch.__version__
