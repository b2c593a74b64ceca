"""Writes docs/peft.md from what tools/peft_methods.py found on several PEFTs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"

SPARED = re.compile(r"^refused: \w+ (with \w+( \([^)]*\))?,? )?(which came after padfree_patch\.apply, )?")

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

`adapter_names` and Poly's `task_ids` say something of each row. Give one value per row, and put only examples that
share it into a row: anything else is an error, and so are names of adapters that a packed row can't have, and names
that the method ignores (all but LoRA, RoAd and GLoRA do). In training, Poly draws which skills a row uses, once for all
of its examples. `disable_adapter`, `set_adapter` and `merge_adapter` between two packed calls count: what is off is no
obstacle, and what comes on is checked. Inside `pack_padded`, batches whose rows a method looks at stay padded.

| method | apply before | apply after | logits | gradients | PEFT |
|---|---|---|---|---|---|
"""


def write_page(folder: Path, page: Path = PAGE) -> None:
    """Writes the page from the files in a folder; not if it tells of a PEFT of which the folder has no file."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if missing := versions_on(page.read_text()) - {each["peft"] for each in found}:
        print(f"left {page} as it is: {folder} has nothing of PEFT {', '.join(sorted(missing, key=Version))}")
        return
    page.write_text(text_of(found))
    print(f"wrote {page}")


def versions_on(text: str) -> set[str]:
    """Returns the PEFTs of which a page tells."""
    return set(re.findall(r"([\w.]+) \(transformers ", text))


def rows_on(text: str) -> Iterator[tuple[str, str, set[str]]]:
    """Yields method, outcome with `apply` before it, and PEFTs of each row of a page."""
    for line in [line for line in text.splitlines() if line.startswith("| ")][1:]:
        name, before, *_, versions = line.strip("| ").split(" | ")
        yield name, before, set(versions.split(", "))


def text_of(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page, of what tools/peft_methods.py found on each PEFT."""
    found = sorted(found, key=lambda each: Version(each["peft"]))
    beside = ", ".join(f"{each['peft']} (transformers {each['transformers']})" for each in found)
    lines = _rows({each["peft"]: each["methods"] for each in found})
    return HEAD.replace("{versions}", beside) + "".join(f"{line}\n" for line in lines)


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
    """Leaves the names of the model and the config, and the advice, out of a refusal."""
    if "padfree_patch.apply, does not isolate" in said:
        return "refused, until `apply` is called again: it brings a decoder of its own"
    return SPARED.sub("refused: ", said).split("; ")[0].split(". ")[0].replace("|", "/")


def _largest(figures: list[Mapping[str, float]], what: str) -> str:
    values = [each[what] for each in figures if what in each]
    return f"{max(values):.0e}".replace("0e+00", "0") if values else ""
