"""The data side and the reading of batches depend on nothing that patches models; read from their import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import padfree_patch

PACKAGE = Path(padfree_patch.__file__).parent

ALLOWED = {
    "batch": {"arguments", "batch", "errors", "versions"},
    "data": {"arguments", "data", "batch", "errors", "html_table", "versions"},
}
"""What the files of a folder may import of this package, by its first name below `padfree_patch`."""


def imported_parts(file: Path, package: Path) -> set[str]:
    """The first names below the package of everything in it that a file imports, also inside functions."""
    here = (package.name, *file.relative_to(package).parent.parts)
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(here[: len(here) - node.level + 1]) if node.level else []
            source = above + (node.module.split(".") if node.module else [])
            modules += [[*source, alias.name] for alias in node.names]
    return {module[1] if len(module) > 1 else "" for module in modules if module[0] == package.name}


def forbidden(package: Path, folder: str) -> dict[str, set[str]]:
    """What the files of a folder import that they may not, by file; asserts that there are files."""
    files = list((package / folder).glob("**/*.py"))
    assert files
    found = {file.name: imported_parts(file, package) - ALLOWED[folder] for file in files}
    return {name: parts for name, parts in found.items() if parts}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(folder):
    assert forbidden(PACKAGE, folder) == {}


def test_imports_are_found_in_every_form():
    """The control: patching is found below what integrations imports, and batch too."""
    assert {"patching", "batch", "data", "errors"} <= imported_parts(PACKAGE / "integrations/trainer.py", PACKAGE)


@pytest.mark.parametrize(
    "line",
    [
        "from ..patching import applied",
        "from .. import patching",
        "import padfree_patch.patching",
        "from padfree_patch.patching.plan import plan",
        "def later():\n    from ..patching.plan import plan",
        "if TYPE_CHECKING:\n    from padfree_patch import patching",
    ],
)
@pytest.mark.parametrize("folder", ALLOWED)
def test_an_import_from_above_is_reported(tmp_path, folder, line):
    """The control: whatever form an import takes, it counts."""
    package = tmp_path / "padfree_patch"
    (package / folder).mkdir(parents=True)
    (package / folder / "innocent.py").write_text(f"import numpy\nfrom ..errors import PadfreeError\n{line}\n")
    assert forbidden(package, folder) == {"innocent.py": {"patching"}}
