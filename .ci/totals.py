"""Adds up the reports that pytest left in nox's environments, and shows where the time went."""

from pathlib import Path
from xml.etree import ElementTree

NOX = Path(".nox")
SLOWEST = 20

reports = {path: ElementTree.parse(path) for path in NOX.glob("t*-*/junit*.xml")}  # tests, trl


def total(count: str) -> int:
    return sum(int(suite.get(count, 0)) for report in reports.values() for suite in report.iter("testsuite"))


def print_sessions() -> None:
    """Prints minutes per session, as noxfile.py wrote them down."""
    rows = [line.split(maxsplit=1) for line in (NOX / "seconds.txt").read_text().splitlines()]
    for seconds, name in rows:
        print(f"{int(seconds) / 60:6.1f} min  {name.strip()}")
    print(f"{sum(int(seconds) for seconds, _ in rows) / 60:6.1f} min  together")


def print_slowest() -> None:
    """Prints the slowest tests of all sessions."""
    cases = [
        (float(case.get("time", 0)), path.parent.name, f"{case.get('classname')}::{case.get('name')}")
        for path, report in reports.items()
        for case in report.iter("testcase")
    ]
    for seconds, session, name in sorted(cases, reverse=True)[:SLOWEST]:
        print(f"{seconds:6.1f} s  {session}  {name}")


print_slowest()
if (NOX / "seconds.txt").exists():
    print_sessions()
failed, skipped = total("failures") + total("errors"), total("skipped")
print(f"{total('tests') - failed - skipped} passed, {failed} failed, {skipped} skipped")
