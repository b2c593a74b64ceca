"""Keeps what tools/breadth.py found on several versions in docs/breadth.json, and draws a part of docs/support.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from known_models import NAMES

FILE = Path(__file__).parents[1] / "docs" / "breadth.json"
SHOWN = "default"
"""The implementation of the tables by name."""

Row = dict[str, Any]
Breadth = dict[str, dict[str, dict[str, Row]]]
"""version -> implementation -> model type -> what came of it."""

WORDS = ("exact", "refused", "WRONG", "crashed", "no decoder", "upstream fails", "not built")
LONGEST_REASON = 600

INTRODUCTION = """\
`nox -s breadth` makes this part, and [breadth.json](breadth.json) for programs: `apply` on a tiny model, with every \
kind of layer that it has, of each causal language model of transformers and each text backbone of a multimodal model. \
A packed row of three examples is compared with each example alone, through an unpatched copy: logits within 2e-5 of \
the largest, gradients within 2e-4 of the parameter's largest, nothing moves when a neighbour changes, and the \
gradients again under both kinds of gradient checkpointing.

- **patch**: exact, and the architecture is registered: the tables further down say more.
- **fast**: exact; no patch is registered, and `apply` found the way by itself. Attention goes to a varlen kernel \
(with sinks on the CPU only: elsewhere it runs on each sequence); what else mixes tokens (*mixers*: state-space \
models, convolutions, linear attention) runs on each sequence.
- **per sequence**, **per layer**: exact; upstream's own attention, or layer, runs on each sequence.
- **named modules**: also modules that `verify` named, such as position embeddings, run on each sequence.
- **no checkpointing**: gradient checkpointing is refused.
- **refused**: `apply` refuses the model, with the reason, and leaves it as it was.
- **upstream fails**, **not built**: transformers cannot run one example alone, or no tiny model could be built here.
- empty: transformers has no such model in that version."""


def merge(folder: Path) -> None:
    """Puts every FOLDER/VERSION.json into the table; versions that are not there stay as they were."""
    found = read()
    for path in folder.glob("*.json"):
        tables = json.loads(path.read_text())
        found[path.stem] = {
            implementation: {name: shortened(row) for name, row in rows.items()}
            for implementation, rows in tables.items()
        }
    FILE.write_text(written(found))


def read() -> Breadth:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def shortened(row: Row) -> Row:
    return {name: _rounded(value) for name, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.1e}")
    return value[:LONGEST_REASON] if isinstance(value, str) else value


def written(found: Breadth) -> str:
    """Returns JSON with one row a line."""
    versions = []
    for version in sorted(found, key=lambda each: [*map(int, each.split("."))]):
        tables = []
        for implementation, rows in sorted(found[version].items()):
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
            tables.append(f"  {json.dumps(implementation)}: {{\n{lines}\n  }}")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(tables) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def section(found: Breadth) -> list[str]:
    """Returns the lines of this part of the page."""
    newest_first = list(found)[::-1]
    types = sorted({name for tables in found.values() for name in tables.get(SHOWN, {})})
    return [
        "## Any decoder, by name",
        "",
        *INTRODUCTION.splitlines(),
        "",
        *_table(["model", "model type", *newest_first], [_by_name(found, name) for name in NAMES]),
        "",
        "### By model type",
        "",
        *_table(["model type", *newest_first], [[name, *_cells(found, name)] for name in types]),
        "",
        "### Figures",
        "",
        "Loaded as *default*: what upstream takes by itself, sdpa where a model has it. *no decoder*: the model is not "
        "causal, even alone and unpatched, and `apply` says so. Errors are the largest of all exact models; seconds "
        "are CPU seconds of `apply` with `verify`, mean and largest, on one thread.",
        "",
        *_table(
            ["transformers", "loaded as", *WORDS, "logits", "gradients", "seconds of apply"],
            [_figures(v, i, rows) for v in newest_first for i, rows in found[v].items()],
        ),
        "",
        "### Refused, and what else is not exact",
        "",
        *_inexact(found),
        "",
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _by_name(found: Breadth, name: str) -> list[str]:
    return [name, NAMES[name], *_cells(found, NAMES[name])]


def _cells(found: Breadth, model_type: str) -> list[str]:
    return [cell(found[version].get(SHOWN, {}).get(model_type)) for version in list(found)[::-1]]


def cell(row: Row | None) -> str:
    """Returns the word for a row of the table.

    >>> cell({"verdict": "exact", "kind": "fast", "checkpointed": {"reentrant": "refused: an error"}})
    'fast, no checkpointing'
    """
    if row is None:
        return ""
    if row["verdict"] != "exact":
        return row["verdict"]
    refused = any(each.startswith("refused") for each in row["checkpointed"].values())
    return row["kind"].replace("registered", "patch") + (", no checkpointing" if refused else "")


def _figures(version: str, implementation: str, rows: dict[str, Row]) -> list[str]:
    counts = Counter(row["verdict"] for row in rows.values())
    exact = [row for row in rows.values() if row["verdict"] == "exact"]
    seconds = [row["seconds"] for row in exact] or [0.0]
    logits, gradients = (max((row[name] for row in exact), default=0.0) for name in ("logits", "gradients"))
    figures = [f"{logits:.0e}", f"{gradients:.0e}", f"{sum(seconds) / len(seconds):.2f}, {max(seconds):.2f}"]
    return [version, implementation, *(str(counts[word]) for word in WORDS), *figures]


def _inexact(found: Breadth) -> list[str]:
    """Returns a line for each thing that is not exact, under checkpointing too, with where it is so."""
    where: dict[tuple[str, str], list[str]] = {}
    for version, tables in found.items():
        for implementation, rows in tables.items():
            for name, row in rows.items():
                if row["verdict"] == "not built" and implementation != SHOWN:
                    continue  # most can't be loaded in this way
                for said in _what_is_not_exact(row):
                    where.setdefault((name, said), []).append(f"{version} ({implementation})")
    return [f"- {name}, on {', '.join(places)}: {said}" for (name, said), places in sorted(where.items())]


def _what_is_not_exact(row: Row) -> list[str]:
    if row["verdict"] not in ("exact", "WRONG", "crashed") or "checkpointed" not in row:
        return [f"{row['verdict']}: {reason(row['why'])}"]
    wrong = [f"WRONG: logits {row['logits']}, gradients {row['gradients']}"] if row["verdict"] == "WRONG" else []
    words = ("refused", "WRONG", "crashed", "upstream is wrong")
    rows = row.get("rows", "exact")
    wrong += [f"several rows: {reason(rows)}"] if rows != "exact" else []
    under = [
        f"{kind} checkpointing: {reason(said)}" for kind, said in row["checkpointed"].items() if said.startswith(words)
    ]
    return wrong + under


def reason(why: str) -> str:
    """Returns what can stand in a line."""
    return " ".join(why.replace("|", "/").split())[:240]
