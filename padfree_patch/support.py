"""What was tested where: support.json, written by `nox -s matrix`, and the page docs/support.md drawn from it.

Cells are addressed by transformers version, model type, attention implementation and variant. A cell says "exact"
(every check of `padfree_patch.testing.CHECKS` passed), "absent: ...", "upstream fails: ..." (unpatched), "refused: ..."
or "wrong: ...", with the reason.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("support.json")

Cells = dict[str, dict[str, dict[str, dict[str, str]]]]


@functools.cache
def cells() -> Cells:
    """version -> model type -> implementation -> variant -> verdict; empty before the first run."""
    found: Cells = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def status(version: str, model_type: str, implementation: str) -> str:
    """One word for all variants: exact, absent, refused, wrong, or "untested"."""
    verdicts = cells().get(version, {}).get(model_type, {}).get(implementation, {})
    return summary(verdicts) if verdicts else "untested"


def summary(verdicts: dict[str, str]) -> str:
    """The worst of the verdicts; a variant that upstream can't build or run does not count against the others."""
    words = {verdict.split(":")[0] for verdict in verdicts.values()}
    for word in ("wrong", "refused", "exact", "upstream fails"):
        if word in words:
            return word
    return "absent"


def page(found: Cells) -> str:
    """docs/support.md."""
    versions = sorted(found, key=lambda version: tuple(map(int, version.split("."))))
    model_types = sorted({model_type for row in found.values() for model_type in row})
    flat = [
        (version, model_type, implementation, variant, verdict)
        for version in versions
        for model_type, implementations in found[version].items()
        for implementation, verdicts in implementations.items()
        for variant, verdict in verdicts.items()
    ]
    count: Any = lambda word: sum(verdict.split(":")[0] == word for *_, verdict in flat)  # noqa: E731
    lines = [
        "# Support",
        "",
        "Made by `nox -s matrix` (machine-readable: `padfree_patch/support.json`). Every cell runs every check of "
        "`padfree_patch.testing.CHECKS` on every variant of the architecture: logits, loss and gradients against each "
        "example alone, isolation bit for bit, rows of a batch, two forwards before one backward with both kinds of "
        "checkpointing, ordinary calls bit-identical.",
        "",
        f"{len(flat)} cells on {len(versions)} transformers versions: {count('exact')} exact, {count('wrong')} wrong, "
        f"{count('refused')} refused, {count('upstream fails')} where upstream itself fails, {count('absent')} where "
        "it has no such model.",
    ]
    for implementation in ("eager", "sdpa"):
        lines += [
            "",
            f"## {implementation}",
            "",
            f"| | {' | '.join(model_types)} |",
            "|---" * (len(model_types) + 1) + "|",
        ]
        for version in versions:
            words = [found[version].get(each, {}).get(implementation, {}) for each in model_types]
            shown = ["" if summary(each) == "absent" else summary(each) for each in words]
            lines.append(f"| {version} | {' | '.join(shown)} |")
    inexact: dict[tuple[str, ...], list[str]] = {}
    for version, *cell, said in flat:
        if said.split(":")[0] not in ("exact", "absent"):
            inexact.setdefault((*cell, said), []).append(version)
    if inexact:
        lines += ["", "## What is not exact", ""]
    for (model_type, implementation, variant, said), where in sorted(inexact.items()):
        lines.append(f"- {model_type}, {variant}, {implementation}, on {', '.join(where)}: {said}")
    return "\n".join(lines) + "\n"
