"""Writes docs/training-results.md from what the tests measured.

Run `make test` before, and every session that the page should cover.

python tools/training_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training-results.md"
COMMANDS = {"tests": "make test", "trl": "nox -s trl", "deepspeed": "nox -s deepspeed"}
"""Session whose report holds a figure -> the command that runs it; nox is in .venv/bin."""

HEAD = """# Training, measured

How close each padding-free run came to its oracle. The oracle of trainers is the same examples padded, of several
processes the same run in one process, of adapters each example alone. A figure is the largest difference of all
versions:

- **Loss**: the absolute difference; trainers log four digits.
- **Weights**: norm of the difference over the norm of what training changed, the largest of all parameters.
- **Gradients**: norm of the difference over the norm of the gradient.

Models are tiny, examples uneven, the dtype float32 unless another is named. The tests bound every figure; controls
(naive packing, adapters without the patch) show that the tests would notice mixing. `python tools/training_results.py`
writes this page from the reports that the commands in the last column leave.

| what | transformers | beside | steps | loss | weights | gradients | command |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(HEAD + "".join(line + "\n" for line in rows(measurements())))
    print(f"wrote {PAGE}")


def measurements() -> list[dict[str, object]]:
    """Reads all figures from pytest's reports, each with its session."""
    found = []
    for path in sorted((ROOT / ".nox").glob("*/junit*.xml")):
        session = path.parent.name.split("-")[0]
        if session not in COMMANDS:
            continue
        for each in ElementTree.parse(path).iter("property"):
            if each.get("name") == "measured":
                found.append({"session": session, **json.loads(each.get("value"))})
    return found


def rows(found: list[dict[str, object]]) -> list[str]:
    claims = dict.fromkeys((each["session"], each["claim"]) for each in found)
    lines = []
    for session, claim in claims:
        of_claim = [each for each in found if (each["session"], each["claim"]) == (session, claim)]
        versions = sorted({each["transformers"] for each in of_claim}, key=Version)
        beside = sorted(
            {each["beside"] for each in of_claim}, key=lambda text: Version(text.split()[-1]) if text else 0
        )
        worst = ("loss", "weights", "gradients")
        cells = (
            claim,
            ", ".join(versions),
            ", ".join([beside[0], *(text.split()[-1] for text in beside[1:])]),
            of_claim[0]["steps"],
            *(largest(of_claim, name) for name in worst),
            f"`{COMMANDS[session]}`",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def largest(found: list[dict[str, object]], name: str) -> str:
    values = [each[name] for each in found if name in each]
    return f"{max(values):.1e}" if values else ""


if __name__ == "__main__":
    main()
