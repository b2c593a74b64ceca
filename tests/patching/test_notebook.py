"""What a user sees: a line in the log, a line instead of the tree of modules in a notebook, and tables of results."""

from __future__ import annotations

import logging

import pytest

import padfree_patch
from padfree_patch import estimate, explain, plan_packing, verify


def test_apply_writes_one_line_to_the_log(llama, caplog):
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama)
    (line,) = caplog.messages
    assert line.startswith("LlamaForCausalLM: patch llama, backend sdpa, verified in ")
    assert line.endswith(" ms")


def test_line_says_what_was_not_verified(llama, caplog):
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama, verify=False)
    assert caplog.messages == ["LlamaForCausalLM: patch llama, not verified"]


def test_level_of_the_logger_controls_the_line(llama, caplog):
    """The control. What measures a model for itself says nothing either."""
    padfree_patch.apply(padfree_patch.restore(llama))
    assert not caplog.messages
    padfree_patch.restore(llama)
    caplog.set_level(logging.INFO, logger="padfree_patch")
    explain(llama)
    with padfree_patch.applied(llama):
        assert not caplog.messages


@pytest.fixture
def shell():
    """IPython as notebooks run it; it shows what a cell's last expression gives."""
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    yield interactive.InteractiveShell.instance()
    interactive.InteractiveShell.clear_instance()


def test_notebook_shows_a_line_instead_of_the_tree_of_modules(shell, llama, capsys):
    shell.push({"padfree_patch": padfree_patch, "model": llama})
    shell.run_cell("padfree_patch.apply(model)")
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM: patch llama, backend sdpa, verified in " in shown
    assert "LlamaDecoderLayer" not in shown
    shell.run_cell("model")
    assert "LlamaDecoderLayer" in capsys.readouterr().out  # the control: asked for, it is there


def test_other_models_of_the_cell_are_shown_as_ever(shell, llama, capsys):
    shell.push({"padfree_patch": padfree_patch, "model": llama, "other": type(llama)(llama.config)})
    shell.run_cell("padfree_patch.apply(model)\nother")
    assert "LlamaDecoderLayer" in capsys.readouterr().out


def test_results_are_tables_in_a_notebook(llama):
    results = [verify(llama), explain(llama), estimate([3, 5, 9], batch_size=3), plan_packing([3, 5, 9], max_length=9)]
    for result in results:
        text = result._repr_html_()
        assert text.startswith("<b") and text.endswith("</table>") and text.count("<tr>") > 2
    assert "color:red" in results[0]._repr_html_() and "color:green" in results[1]._repr_html_()
    assert "&lt;" in explain(llama, verbose=True)._repr_html_()  # ">=4.34,<5.25" is no markup


def test_explain_takes_five_lines_and_says_the_rest_when_asked(llama):
    short, whole = str(explain(llama)), str(explain(llama, verbose=True))
    assert len(short.splitlines()) == 5
    assert "the other backends, and what is wrapped" in short
    assert short.splitlines()[:4] == whole.splitlines()[:4]
    assert "apply wraps: transformers.models.llama" in whole and "backend flex: " in whole
    assert explain(llama).as_dict() == explain(llama, verbose=True).as_dict()
