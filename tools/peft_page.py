"""Writes docs/peft.md from what tools/peft_methods.py found on several PEFTs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"

HEAD = """# PEFT's methods

What a packed row gives with every method of PEFT, measured by `.venv/bin/nox -s peft`, which writes this page. A tiny
Llama (sdpa, float32) trains on four examples in one row. The oracle is each example alone through the same method
without this package. Both orders were tried: `apply` before `get_peft_model`, and after it. The mode is train, except
for PVERA and MonteCLoRA, which draw their weights in training.

- **exact**: logits, and the gradient of every trainable parameter, are those of each example alone. The two figures are
  the largest difference of the logits, relative to the largest, and of a gradient, relative to the largest norm.
- **refused**: the packed call (and `apply`, if it comes after) is an error that names the method and the reason. Padded
  batches of the same model go on working.
- **PEFT fails**: PEFT can't run the method beside that transformers, without this package either.

PEFT {versions}.

Adapters that come after `apply` are checked at their first packed call, as `padfree_patch.verify` checks a model. So a
method that is not in this table, or one of your own, is exact or an error too. Only what a method does to gradients in
train mode alone would go unseen there: VeLoRA is refused by its config.

`adapter_names` and Poly's `task_ids` say something of each row: give one value per row, and put only examples that
share it into a row.

| method | apply before | apply after | logits | gradients | PEFT |
|---|---|---|---|---|---|
"""


def write_page(folder: Path) -> None:
    """Writes the page from the files in a folder."""
    found = sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda e: Version(e["peft"]))
    beside = ", ".join(f"{each['peft']} (transformers {each['transformers']})" for each in found)
    lines = list(_rows({each["peft"]: each["methods"] for each in found}))
    PAGE.write_text(HEAD.replace("{versions}", beside) + "".join(f"{line}\n" for line in lines))
    print(f"wrote {PAGE}: {len(lines)} rows")


def _rows(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields a row for each method and outcome, with the PEFTs on which it was that."""
    names = sorted({name for methods in found.values() for name in methods})
    for name in names:
        outcomes = defaultdict(list)
        for version, methods in found.items():
            if name in methods:
                outcomes[_said(methods[name])].append(version)
        for (before, after), versions in outcomes.items():
            figures = [found[version][name].get(order, {}) for version in versions for order in ("before", "after")]
            logits, gradients = (_largest(figures, what) for what in ("logits", "gradients"))
            yield f"| {name} | {before} | {after} | {logits} | {gradients} | {', '.join(versions)} |"


def _said(result: Mapping[str, Any]) -> tuple[str, str]:
    if "said" in result:
        what = result["said"].replace("fails without us", "PEFT fails").replace("|", "/")
        return what, what
    return _short(result["before"]["said"]), _short(result["after"]["said"])


def _short(said: str) -> str:
    """Leaves the model's class and the advice out of a refusal."""
    if not said.startswith("refused: "):
        return said
    if "came after padfree_patch.apply" in said:
        return "refused, until `apply` is called again: it brings a decoder of its own"
    reason = said.split("; ")[0].partition(" with ")[2].partition(" ")[2]
    return f"refused: {reason}"


def _largest(figures: list[Mapping[str, float]], what: str) -> str:
    values = [each[what] for each in figures if what in each]
    return f"{max(values):.0e}".replace("0e+00", "0") if values else ""
