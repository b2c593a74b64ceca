"""Links lead somewhere: those between pages to a file and a heading, the README's also from an index page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
"""A link in the text, or one that the end of a page defines."""
REPOSITORY = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
OURS = re.compile(rf"{REPOSITORY}/(?:blob|raw)/main/(.*)")


def links_of(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [inline or defined for inline, defined in LINK.findall(text)]


def headings_of(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    lines = [line.lstrip("#") for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-") for line in lines}


def leads_nowhere(page: Path, link: str) -> bool:
    target = ROOT / ours[1] if (ours := OURS.fullmatch(link)) else page.parent / link
    if link.startswith(("https:", "http:")) and not ours:
        return False
    path, _, heading = str(target).partition("#")
    file = page if link.startswith("#") else Path(path)
    return not file.exists() or (bool(heading) and heading not in headings_of(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert [link for link in links_of(page) if leads_nowhere(page, link)] == []


def test_links_of_the_readme_work_on_an_index_page():
    links = links_of(ROOT / "README.md")
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize(
    "link", ["nowhere.md", "guide.md#no-such-heading", f"{REPOSITORY}/blob/main/nowhere.md", "#no-such-heading"]
)
def test_a_link_to_nowhere_is_found(link):
    """The control."""
    assert leads_nowhere(ROOT / "docs" / "design.md", link)
    assert not leads_nowhere(ROOT / "docs" / "design.md", "guide.md#a-packed-batch")
