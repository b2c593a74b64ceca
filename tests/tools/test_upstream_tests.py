"""Of a checkout made up here, `nox -s upstream` finds just the test that a broken seam breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import upstream_page
import upstream_tests
from padfree_patch import versions

VERSION = str(versions.transformers_version())
LLAMA = "tests/models/llama/test_modeling_llama.py"

TESTS = """
import random, tempfile, unittest.mock
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

TINY = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)

class Test(unittest.TestCase):
    def run_tokens(self, count, model=None):
        torch.manual_seed(1)
        model = (model or LlamaForCausalLM(LlamaConfig(**TINY))).eval()
        ids = torch.arange(count)[None]
        assert model(input_ids=ids, position_ids=ids).logits.shape == (1, count, 20)

    def test_ordinary_call(self):
        self.run_tokens(4)

    def test_broken_seam(self):
        "The control: without apply nothing calls what is broken here."
        with unittest.mock.patch("padfree_patch.wrapping.call.Call.proceed", side_effect=AssertionError("broken")):
            self.run_tokens(4)

    def test_unpatched_fails(self):
        self.run_tokens(4)
        assert False, "as upstream is"

    @unittest.skip("no GPU")
    def test_skipped(self):
        pass

    def test_models_from_everywhere(self):
        "Three of a supported type: by its class, loaded, from a config; and one of no supported type."
        model = LlamaForCausalLM(LlamaConfig(**TINY))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.run_tokens(4, LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)[0])
        LlamaModel._from_config(LlamaConfig(**TINY))
        BertModel(BertConfig(**TINY))

    def test_refused_model_is_left_alone(self):
        config = LlamaConfig(**TINY)
        class Attentionless(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.model.layers = torch.nn.ModuleList()
        Attentionless(config)

    def test_same_numbers_are_drawn(self):
        assert (random.random(), torch.rand(1).item()) == (0.8444218515250481, 0.49625658988952637)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    files = {"src/transformers/__init__.py": f'__version__ = "{VERSION}"\n', LLAMA: TESTS}
    files["pyproject.toml"] = "[tool.pytest.ini_options]\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.slow
def test_just_the_test_that_the_broken_seam_breaks_is_found(checkout):
    command = [sys.executable, upstream_tests.__file__, str(checkout)]
    files = sorted(checkout.rglob("*"))
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 1, done.stdout
    assert f"transformers {VERSION}: 7 tests without apply: 5 pass, 1 fail, 1 are skipped" in done.stdout
    assert "with apply: 4 of the 5 pass; 3 of them build models that it takes, 5 in all" in done.stdout
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    assert broken == [f"BROKEN {LLAMA}::Test::test_broken_seam"]
    assert "    failed: AssertionError: broken" in done.stdout
    assert "apply refused 1 times: Attentionless: " in done.stdout
    assert sorted(checkout.rglob("*")) == files  # nothing is written there


@pytest.mark.parametrize(("with_apply", "status"), [("passed", 0), ("failed", 1), ("skipped", 1)])
def test_status_says_whether_what_passes_without_passes_with(checkout, monkeypatch, capsys, with_apply, status):
    def outcomes_of(checkout, options):
        outcome = with_apply if "--apply" in options else "passed"
        return {"a": {"outcome": outcome, "error": "E", "applied": 1, "refused": []}}

    monkeypatch.setattr(upstream_tests, "outcomes_of", outcomes_of)
    assert upstream_tests.main(checkout, []) == status
    assert (f"BROKEN a\n    {with_apply}: E" in capsys.readouterr().out) == bool(status)


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(upstream_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(upstream_page, "DATA", tmp_path / "page.json")
    return tmp_path / "page.md"


def test_page_counts_what_was_found_and_names_what_broke(checkout, monkeypatch, page):
    def outcomes_of(checkout, options):
        assert options[-1] == LLAMA and "--page" not in options
        outcome = "failed" if "--apply" in options else "passed"
        built = {"error": "E", "applied": 3, "refused": ["LlamaModel: not so; it has more"]}
        return {f"{LLAMA}::a": {"outcome": outcome, **built}, f"{LLAMA}::b": {"outcome": "passed", **built}}

    monkeypatch.setattr(upstream_tests, "outcomes_of", outcomes_of)
    assert upstream_tests.main(checkout, ["--page", LLAMA, "-k", "not Hard"]) == 1
    text = page.read_text()
    assert ".venv/bin/nox -s upstream -- CHECKOUT --page -k 'not Hard'\n" in text
    assert "| llama | 2 | 0 | 2 | 1 | 2 | 6 |" in text
    assert f"Pass without, and not with:\n\n- `{LLAMA}::a`: failed: E\n" in text
    assert text.count("- LlamaModel: not so\n") == 1


def test_page_keeps_what_the_same_commit_found_before(page):
    counts = {**dict.fromkeys(upstream_page.COUNTS, 1), "broken": [], "refused": []}
    about = {"commit": "a", "torch": "2", "options": ""}
    upstream_page.update("4.9.0", about, {"phi": counts})
    upstream_page.update("4.10.0", about, {"phi": counts})
    upstream_page.update("4.10.0", about, {"gemma": counts})
    text = page.read_text()
    assert text.index("## 4.10.0") < text.index("| gemma | 1") < text.index("| all | 2") < text.index("## 4.9.0")
    assert text.count("| phi |") == 2
    upstream_page.update("4.10.0", {**about, "commit": "b"}, {"gemma": counts})  # other sources, other figures
    assert page.read_text().count("| phi |") == 1


def test_page_in_the_docs_is_drawn_from_its_data():
    assert upstream_page.PAGE.read_text() == upstream_page.page(json.loads(upstream_page.DATA.read_text()))


@pytest.mark.parametrize(("version", "installed"), [("4.9.1", "transformers==4.9.1"), ("4.9.0.dev0", "a copy")])
def test_versions_that_no_index_has_are_installed_from_a_copy(tmp_path, version, installed):
    checkout, folder = tmp_path / "checkout", tmp_path / "folder"
    for name, text in {
        "src/transformers/__init__.py": f'__version__ = "{version}"\n',
        "setup.py": '"parameterized", "pytest>=7.2.0,<8.0.0", "pytest-xdist",',
        "tests/a.py": "",
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    copy = folder / "transformers"
    requirement = str(copy) if installed == "a copy" else installed
    assert upstream_tests.needs(checkout, folder) == [version, requirement, "pytest>=7.2.0,<8.0.0"]
    assert (copy / "src" / "transformers" / "__init__.py").exists() == (installed == "a copy")
    assert not (copy / "tests").exists()


@pytest.mark.parametrize(("version", "found"), [("4.36.2", "pytest>=7.2.0,<8"), ("4.57.6", "pytest>=7.2.0,<9")])
def test_pytest_is_no_later_than_the_tests(tmp_path, version, found):
    (tmp_path / "src" / "transformers").mkdir(parents=True)
    (tmp_path / "src" / "transformers" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "setup.py").write_text('"pytest>=7.2.0",')
    assert upstream_tests.needs(tmp_path, tmp_path / "folder")[2] == found


def test_nothing_compared_is_no_success(checkout, monkeypatch):
    monkeypatch.setattr(upstream_tests, "outcomes_of", lambda checkout, options: {})
    assert upstream_tests.main(checkout, []) == upstream_tests.NOT_COMPARED


def test_checkout_of_another_version_is_refused(tmp_path, capsys):
    file = tmp_path / "src" / "transformers" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text('__version__ = "4.0.0"\n')
    with pytest.raises(SystemExit) as stopped:
        upstream_tests.main(tmp_path, [])
    assert stopped.value.code == upstream_tests.NOT_COMPARED
    assert f"is transformers 4.0.0, installed is {VERSION}; `git checkout v{VERSION}`" in capsys.readouterr().err


def test_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        upstream_tests.main(tmp_path, [])
    assert "expected a checkout of transformers" in capsys.readouterr().err


def test_test_that_did_not_run_with_apply_is_broken():
    passed = {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}
    assert upstream_tests.broken_by_apply(passed, {}) == {"a": "did not run"}
