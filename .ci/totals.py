"""Adds up the reports that pytest left in nox's environments."""

from pathlib import Path
from xml.etree import ElementTree

reports = [ElementTree.parse(path) for path in Path(".nox").glob("t*-*/junit*.xml")]  # tests, trl


def total(count: str) -> int:
    return sum(int(suite.get(count, 0)) for report in reports for suite in report.iter("testsuite"))


failed, skipped = total("failures") + total("errors"), total("skipped")
print(f"{total('tests') - failed - skipped} passed, {failed} failed, {skipped} skipped")
