"""What commands print: text that reads well, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


class Result(Protocol):
    """What a command found: `str()` reads well, `as_dict()` is for machines."""

    def as_dict(self) -> Mapping[str, object]: ...


def print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo(str(result))


def print_json(found: Mapping[str, object]) -> None:
    """Prints an object; what was not measured is NaN, which JSON does not have, and becomes null."""
    text = json.dumps(found)
    click.echo(json.dumps(json.loads(text, parse_constant=lambda _: None)))
