"""What the site has beside docs/: a hook of mkdocs that makes pages of other files, and leads links to them.

The files read well where they are, and their links are right there. A link to a file that is a page leads to the page;
one to another file of the repository, or to a folder, leads to where the repository is kept.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "glossary.md": "CONTRIBUTING.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "recipes.md": "examples/README.md",
    "notebook.md": "examples/tour.ipynb",
    "third-party-patch.md": "examples/third_party_patch/README.md",
    "reference.md": "padfree_patch/__init__.py",
}
"""Pages that are made of other files, by name."""

PAGE_OF = {source: page for page, source in PAGES.items() if page != "glossary.md"} | {"docs/README.md": "index.md"}
RECIPES = {f"examples/{path.name}": path.name.replace(".", "") for path in (ROOT / "examples").glob("*.py")}
"""Where each recipe is on the page of all, by its path."""
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)|!\[(?P<alt>[^\]]*)\]\((?P<image>[^)\s]+)\)")
DEFINED = re.compile(r"^(\[[^\]]+\]: +)(\S+)$", re.MULTILINE)
"""A link by name, at the end of a file."""
GROUPS = {
    "Patch a model": ("apply", "restore", "applied", "verify", "explain", "Verification", "Explanation"),
    "Collate": (
        "DataCollatorWithFlattening",
        "DataCollatorForCompletionOnlyLM",
        "DataCollatorForPreference",
        "DataCollatorForSequenceClassification",
    ),
    "Fill rows": ("pack_dataset", "plan_packing", "PackingPlan", "TokenBudgetBatchSampler", "estimate", "Estimate"),
    "Train and evaluate": ("PaddingFreeCallback", "PerExampleMetrics"),
    "Back to examples": ("PackedSequences", "unpack", "last_tokens", "sequence_log_probs"),
    "Errors": ("PadfreeError", "LeakError"),
    "Write a patch": ("Patch", "AttentionCall"),
}
"""The public names on the reference page; those in no group come at the end."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, name, content=content_of(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links of a page, which are right in the repository, to pages of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return with_links_led(markdown, source, repository())


def repository() -> str | None:
    """Returns the address of the repository, if pyproject.toml has one."""
    import tomllib

    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    return urls.get("Repository", "").rstrip("/") or None


def content_of(name: str) -> str:
    """Returns the Markdown of a page that is made of another file."""
    text = (ROOT / PAGES[name]).read_text()
    if name == "glossary.md":
        return "# Glossary\n" + section(text, "Words")
    if name == "recipes.md":
        return text + "".join(recipe(path) for path in sorted((ROOT / "examples").glob("*.py")))
    if name == "notebook.md":
        return notebook(json.loads(text))
    return reference(public_names(text)) if name == "reference.md" else text


def section(text: str, title: str) -> str:
    """Returns what stands under a heading of the second level."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def recipe(path: Path) -> str:
    """Returns a recipe as a part of a page: its file."""
    return f"\n## {path.name}\n\n```python\n{path.read_text()}```\n"


def notebook(cells: dict[str, list[dict[str, object]]]) -> str:
    """Returns a notebook as Markdown: texts, code, and what it printed, drew or laid out as HTML."""
    return "\n\n".join(part for cell in cells["cells"] for part in _cell(cell))


def _cell(cell: dict[str, object]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    outputs = [_output(each) for each in cell["outputs"]]
    return [f"```python\n{source}\n```", *filter(None, outputs)]


def _output(output: dict[str, object]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        return "".join(data["text/html"])
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def public_names(text: str) -> list[str]:
    """Returns `__all__` of a module's text."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise ValueError("no __all__")


def reference(names: list[str]) -> str:
    """Returns a page of what mkdocstrings reads from the docstrings of these names."""
    grouped = {name for group in GROUPS.values() for name in group}
    groups = {**GROUPS, "More": tuple(name for name in names if name not in grouped)}
    parts = ["# Reference\n\nEvery public name of the package, from its docstring."]
    for title, group in groups.items():
        parts += [f"## {title}", *(f"::: padfree_patch.{name}" for name in group if name in names)] if group else []
    return "\n\n".join(parts)


def with_links_led(markdown: str, source: str, repository: str | None) -> str:
    """Leads every link of a file, by its path in the repository, to a page of the site or to the repository."""

    def led(match: re.Match[str]) -> str:
        target = match["target"] or match["image"]
        led_to = _led(target, source, repository)
        return match["text"] if led_to is None else match[0].replace(f"({target})", f"({led_to})")

    def defined(match: re.Match[str]) -> str:
        return f"{match[1]}{_led(match[2], source, repository) or match[2]}"

    fence = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
    parts = fence.split(markdown)
    return "".join(part if part.startswith("```") else DEFINED.sub(defined, LINK.sub(led, part)) for part in parts)


def _led(target: str, source: str, repository: str | None) -> str | None:
    """Returns where a link of a file leads on the site; None for a file that is nowhere but in the repository."""
    path, _, anchor = target.partition("#")
    anchor = f"#{anchor}" if anchor else ""
    raw = (repository or "").replace("//github.com", "//raw.githubusercontent.com")
    for begins in (f"{repository}/blob/main/", f"{repository}/tree/main/", f"{raw}/main/"):
        if path.startswith(begins):
            path, source = path[len(begins) :], "README.md"
    if not path or "://" in path or path.startswith("mailto:"):
        return target
    inside = os.path.normpath(Path(source).parent / path)
    if inside in PAGE_OF:
        return PAGE_OF[inside] + anchor
    if inside in RECIPES:
        return f"recipes.md#{RECIPES[inside]}"
    if inside.startswith("docs/") and (ROOT / inside).is_file():
        return inside.removeprefix("docs/") + anchor
    if not (ROOT / inside).exists():
        return target  # which the strict build reports
    kind = "tree" if (ROOT / inside).is_dir() else "blob"
    return f"{repository}/{kind}/main/{inside}{anchor}" if repository else None
