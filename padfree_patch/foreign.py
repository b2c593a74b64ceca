"""Runs other people's code on other people's files: whatever it raises becomes one line that says what failed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import PadfreeError

HUB_SECONDS = 10
"""How long the hub may take to say whether it has a name."""


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
        raise PadfreeError(f"{what}: {_one_line(error)}") from error
    finally:
        hub.setLevel(level)


def check_there(name: str, what: str) -> None:
    """Asks the disk, and then the hub once, whether there is a folder or repository of this name.

    A loader would ask for one file after the other, each several times. Imports neither torch nor transformers.

    Raises PadfreeError, of one line that begins with `what`, if there is none.
    """
    with explained(what):
        reason = _why_no_folder(name)
        if reason is not None and not _may_be_a_path(name):
            reason = _why_not_on_hub(name)
    if reason is not None:
        raise PadfreeError(f"{what}: {reason}")


def _why_no_folder(name: str) -> str | None:
    place = Path(name)
    if place.is_dir():
        return None
    return "it is a file, not a folder" if place.exists() else "there is no such folder"


def _may_be_a_path(name: str) -> bool:
    """Whether a name can only be a path: on the hub it is `name` or `owner/name`, without dots or slashes around."""
    parts = name.replace(os.sep, "/").split("/")
    return Path(name).exists() or len(parts) > 2 or parts[0] in ("", ".", "..", "~") or not parts[-1]


def _why_not_on_hub(name: str) -> str | None:
    """Says why the hub has no such repository; None if it has one, or the loader should try."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if not _is_in_cache(name):
            HfApi().model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        return "there is no such folder, and nothing of this name on the hub, or it is private"
    except HFValidationError:
        return "there is no such folder, and nothing on the hub can have this name"
    except HfHubHTTPError:  # the loader will say what it means
        return None
    except Exception as error:  # of whichever HTTP client the hub's version uses: offline, no such host, too slow
        return f"there is no such folder, and the hub can't be asked: {_one_line(error)}"
    return None


def _is_in_cache(name: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    caches = (constants.HF_HUB_CACHE, os.environ.get("TRANSFORMERS_CACHE"))  # the second before transformers 5
    return any(cache and Path(cache, folder, "snapshots").is_dir() for cache in caches)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else f'{text[:400]}...'}"
