"""How the code is laid out: nothing private crosses files, and files and functions are short."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ("padfree_patch", "patches")
FOLDERS = (*PACKAGE, "tests", "tools", "benchmarks", "examples", ".ci")
FILES = [ROOT / "noxfile.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
OURS = ("padfree_patch", "helpers", *(path.stem for path in (ROOT / "tools").glob("*.py")))
"""What our imports begin with; relative ones are ours too."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imports_of_ours(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields the dotted name of everything of ours that a file imports, and under which name it has it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            if node.level or source.split(".")[0] in OURS:
                yield from ((f"{source}.{each.name}", each.asname or each.name) for each in node.names)
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] in OURS:
                    yield each.name, each.asname or each.name.split(".")[0]


def private_names(text: str) -> set[str]:
    """Returns the private names of other files of ours that a file imports, or reaches through what it imports."""
    tree = ast.parse(text)
    imported = dict(imports_of_ours(tree))
    here = set(imported.values())
    found = {name for name in imported if any(map(is_private, name.split(".")))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            dotted = ast.unparse(node)
            if dotted.split(".")[0] in here:
                found.add(dotted)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("getattr", "setattr"):
            found |= private_names_in_patch(node, here)
    return found


def private_names_in_patch(call: ast.Call, here: set[str]) -> set[str]:
    """Returns the private name that a getattr, setattr or monkeypatch.setattr reaches in something that is imported."""
    if len(call.args) < 2 or not isinstance(call.args[1], ast.Constant):
        return set()
    owner, name = ast.unparse(call.args[0]), str(call.args[1].value)
    return {f"{owner}.{name}"} if owner.split(".")[0] in here and is_private(name) else set()


def test_no_file_uses_anything_private_of_another():
    assert len(FILES) > 150
    found = {str(path.relative_to(ROOT)): private_names(path.read_text()) for path in FILES}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "text",
    [
        "from ..batch.cache import _known",
        "from padfree_patch._hidden import name",
        "from padfree_patch import cache as kept\nkept._known.clear()",
        "import helpers.models\nhelpers.models._make()",
        "from padfree_patch import cache\nmonkeypatch.setattr(cache, '_known', {})",
        "def late():\n    from .cache import _known",
    ],
)
def test_private_name_of_another_file_is_found(text):
    """The control."""
    assert private_names(text)


@pytest.mark.parametrize("text", ["import torch\ntorch._dynamo.reset()", "self._own = 1", "from . import __version__"])
def test_own_and_others_private_names_are_not_meant(text):
    assert not private_names(text)


def test_no_file_has_over_300_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 300}


def test_median_function_of_the_package_has_under_ten_lines():
    nodes = [node for folder in PACKAGE for path in (ROOT / folder).rglob("*.py") for node in ast.walk(parsed(path))]
    lengths = [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(lengths) > 300
    assert statistics.median(lengths) < 10


LINES_PER_ANY = 200


def any_count(text: str) -> int:
    """Returns how often `Any` stands in a file, its import counted too."""
    return len(re.findall(r"\bAny\b", text))


def test_any_is_rare_in_the_package():
    """At most one in two hundred lines: what is `Any`, mypy does not check, and new code copies it.

    `padfree_patch/upstream.py` has names for what is truly open.
    """
    texts = [path.read_text() for folder in PACKAGE for path in (ROOT / folder).rglob("*.py")]
    lines, found = sum(len(text.splitlines()) for text in texts), sum(map(any_count, texts))
    assert lines > 10_000
    assert found * LINES_PER_ANY <= lines, f"{found} times Any in {lines} lines; give real types, see upstream.py"


def test_any_is_counted_as_a_word():
    assert any_count("from typing import Any\n\ndef any(value: Any) -> dict[str, Any]: ...  # Anything, AnyStr") == 3


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def test_no_test_file_imports_another():
    tests = {path.stem for pattern in ("test_*.py", "*_check*.py", "conftest.py") for path in TESTS.rglob(pattern)}
    for path in TESTS.rglob("*.py"):
        nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
        assert not [name for name in modules if name.split(".")[-1] in tests], path
