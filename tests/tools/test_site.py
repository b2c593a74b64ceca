"""The site's hook: pages that are made of other files, and where links lead. `nox -s docs` builds the site itself."""

from __future__ import annotations

import json
import re

import pytest

import padfree_patch
import site_hook as site

URL = "https://github.com/someone/somewhere"


@pytest.mark.parametrize(
    ("source", "link", "led"),
    [
        ("README.md", "docs/guide.md#a-packed-batch", "guide.md#a-packed-batch"),
        ("README.md", f"{URL}/blob/main/docs/guide.md", "guide.md"),
        ("README.md", f"{URL}/blob/main/examples/README.md", "recipes.md"),
        ("README.md", "https://raw.githubusercontent.com/someone/somewhere/main/docs/pictures/x.png", "{same}"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("docs/design.md", "../CONTRIBUTING.md#words", "contributing.md#words"),
        ("docs/tour.md", "../examples/README.md", "recipes.md"),
        ("docs/training.md", "../examples/reward_model.py", "recipes.md#reward_modelpy"),
        ("examples/README.md", "third_party_patch/README.md", "third-party-patch.md"),
        ("docs/design.md", "#decisions", "#decisions"),
        ("docs/design.md", "https://pytorch.org", "https://pytorch.org"),
        ("docs/design.md", "../patches/", f"{URL}/tree/main/patches"),
        ("docs/design.md", "../noxfile.py", f"{URL}/blob/main/noxfile.py"),
        ("docs/design.md", "nothing.md", "nothing.md"),  # which the strict build reports
    ],
)
def test_links_lead_to_pages_or_to_the_repository(source, link, led):
    led = led.format(same=link)
    assert site.with_links_led(f"see [it]({link}).", source, URL) == f"see [it]({led})."


def test_a_picture_of_the_repository_is_the_sites_own():
    address = "https://raw.githubusercontent.com/someone/somewhere/main/docs/pictures/packed-row.png"
    assert site.with_links_led(f"![it]({address})", "README.md", URL) == "![it](pictures/packed-row.png)"


def test_code_is_left_as_it_is():
    text = "```python\nx = f[a](docs/guide.md)\n```\n"
    assert site.with_links_led(text, "README.md", URL) == text


def test_without_an_address_a_file_is_named_only():
    assert site.with_links_led("[noxfile](../noxfile.py)", "docs/design.md", None) == "noxfile"


def test_every_public_name_is_on_the_reference_page_once():
    shown = re.findall(r"^::: padfree_patch\.(\w+)$", site.content_of("reference.md"), re.MULTILINE)
    assert sorted(shown) == sorted(name for name in padfree_patch.__all__ if name != "__version__")


def test_pages_hold_what_they_are_made_of():
    assert "| packed row |" in site.content_of("glossary.md") and "## Promises" not in site.content_of("glossary.md")
    recipes = site.content_of("recipes.md")
    assert all(f"\n## {anchor}" in recipes for anchor in (path.split("/")[1] for path in site.RECIPES))
    cells = {
        "cells": [
            {"cell_type": "markdown", "source": ["# A\n", "b"]},
            {"cell_type": "code", "source": ["f()"], "outputs": [{"text": ["1\n"]}, {"data": {"image/png": "QUJD"}}]},
        ]
    }
    assert site.notebook(json.loads(json.dumps(cells))) == (
        '# A\nb\n\n```python\nf()\n```\n\n```text\n1\n```\n\n<img alt="" src="data:image/png;base64,QUJD">'
    )
