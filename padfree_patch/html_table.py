"""What notebooks show of a result: a heading, and a table of what was found."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(heading: str, rows: Iterable[tuple[str, object]], *, good: bool | None = None) -> str:
    """Makes a table of names and values, under a heading that is green if all is good and red if not.

    >>> html_table("2 < 3", [("rows", 4)])
    '<b>2 &lt; 3</b><table><tr><th style="text-align:left">rows</th><td style="text-align:left">4</td></tr></table>'
    """
    color = "" if good is None else f' style="color:{"green" if good else "red"}"'
    left = 'style="text-align:left"'
    cells = (f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<b{color}>{escape(heading)}</b><table>{''.join(cells)}</table>"
