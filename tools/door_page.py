"""Writes the table of docs/tools.md from what tools/door.py measured: `python tools/door_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE, FOUND = Path("docs", "tools.md"), Path("docs", "tools.json")
BEGIN, END = "<!-- door:begin (tools/door_page.py writes this table) -->", "<!-- door:end -->"
HEAD = (
    "| tool | switched on | versions | without the door | with it | verified | losses apart | what the door adds |",
    "|---|---|---|---|---|---|---|---|",
)
MIXES = 1e-3
"""A change of other examples' logits above which they mix; rounding is a thousand times less."""

Finding = dict[str, Any]


def measured(side: Finding) -> str:
    """Says how much other examples' logits change when one is replaced, and how far all are from each alone."""
    if side["error"] and side["status"]:
        return f"stops: {side['error'][:90]}"
    if "change" not in side:
        return "nothing was trained"
    if not side["packed"]:
        return "no row holds two examples"
    figures = f"{short(side['change'])} / {short(side['alone'])}"
    if side["change"] > MIXES:
        return f"**{figures}: they mix**"
    return f"{figures}, **loss {short(side['labels'])}**" if crosses(side) else figures


def crosses(side: Finding) -> bool:
    """Whether first tokens are trained from the example before theirs."""
    return (side.get("labels") or 0) > MIXES


def short(value: float) -> str:
    return f"{value:.1g}" if value < 1 else f"{value:.1f}"


def losses_apart(finding: Finding) -> str:
    before, after = (finding[side].get("losses") or [] for side in ("without", "with"))
    if not before or len(before) != len(after):
        return "-"
    return short(max(abs(a - b) for a, b in zip(before, after)))


def added(finding: Finding) -> str:
    """Says in words what differs between the two runs."""
    before, after = finding["without"], finding["with"]
    advice = [line for line in after["said"] if "switch on" in line]
    if advice:
        return "says: in " + advice[0].rpartition(". In ")[2]
    if after["status"] or "change" not in after:
        return "nothing: the tool's own check comes first"
    if before.get("change", 0) > MIXES >= after["change"]:
        return "**isolates**"
    if crosses(before) and not crosses(after):
        return "**ignores labels across boundaries**"
    return "the proof" if after["verified"] else "nothing"


def row_of(name: str, finding: Finding) -> str:
    tool, _, how = name.rpartition(" (")[0].partition(": ")
    versions = ", ".join(f"{each} {version}" for each, version in sorted(finding["versions"].items()))
    with_door = finding["with"]
    verified = f"{with_door['verified']} line" if with_door["verified"] == 1 else f"{with_door['verified']} lines"
    cells = (tool, how, versions, measured(finding["without"]), measured(with_door), verified, losses_apart(finding))
    return "| " + " | ".join([*cells, added(finding)]) + " |"


def write_page(found: dict[str, Finding]) -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([*HEAD, *(row_of(name, finding) for name, finding in found.items())])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    write_page(json.loads(FOUND.read_text()))
