"""Writes down how long each session of noxfile.py took; `.ci/totals.py` prints it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import nox

SECONDS = Path(".nox", "seconds.txt")


def timed(session_function: Callable[..., None]) -> Callable[..., None]:
    """Adds a line to `SECONDS` when the session ends, also by failing."""

    @functools.wraps(session_function)
    def run(session: nox.Session, *arguments: object, **parameters: object) -> None:
        start = time.monotonic()
        try:
            session_function(session, *arguments, **parameters)
        finally:
            SECONDS.parent.mkdir(exist_ok=True)
            with SECONDS.open("a") as file:
                print(f"{time.monotonic() - start:.0f} {session.name}", file=file)

    return run
