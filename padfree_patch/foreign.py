"""Runs other people's code on other people's files: whatever it raises becomes one line that says what failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from .errors import PadfreeError


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns every error into a PadfreeError of one line, and keeps the hub's client from logging each of its retries.

    A damaged file makes loaders raise anything, KeyError and the panics of Rust among it, so all errors are caught.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, PadfreeError):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        shown = text if len(text) <= 400 else f"{text[:400]}..."
        raise PadfreeError(f"{what}: {type(error).__name__}: {shown}") from error
    finally:
        hub.setLevel(level)
