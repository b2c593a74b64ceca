"""Starts a command so that it, and every Python that it starts, goes through the door.

This process becomes the command: it has its process id, its signals and its exit status. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import PadfreeError
from .options import Options, check_backend, variables

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""What a shell returns for a command that is not there, or that can't be executed."""


def start(command: Sequence[str], *, backend: str, allow_unpatched: bool, print_env: bool) -> None:
    """Executes a command in the place of this process, or prints the variables that it would be given.

    Raises PadfreeError if it can't go through the door, SystemExit if it can't be executed.
    """
    options = Options(check_backend(backend), strict=not allow_unpatched)
    added = variables(options, os.environ)
    if print_env:
        if command:
            raise PadfreeError("run --print-env takes no command: it prints what to set where the command will run")
        for name, value in added.items():
            print(f"{name}={shlex.quote(value)}")
        return
    if not command:
        raise PadfreeError("run: no command; write it behind the options, as in padfree-patch run trl sft ...")
    _execute(command, {**os.environ, **added})


def _execute(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    found = shutil.which(command[0])
    if found is None:
        there = os.path.exists(command[0]) and os.sep in command[0]
        _stop(NOT_EXECUTABLE if there else NOT_FOUND, f"{command[0]}: {'not executable' if there else 'not found'}")
    check_python_options([*_interpreter_of(found), *command])
    sys.stdout.flush()
    sys.stderr.flush()
    _hear_signals()
    try:
        os.execve(found, list(command), environment)
    except OSError as error:
        _stop(NOT_EXECUTABLE, f"{command[0]}: {error.strerror}")


def _hear_signals() -> None:
    """Undoes what Python does as it starts: a command would inherit it, and `... | head` would not end it."""
    for name in ("SIGPIPE", "SIGXFZ", "SIGXFSZ"):  # those that subprocess restores, too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _stop(status: int, why: str) -> NoReturn:
    print(f"padfree-patch: run: {why}", file=sys.stderr)
    raise SystemExit(status)


_PYTHON = re.compile(r"(python|pypy)[\d.]*(t|d)?(\.exe)?")
_CLOSED = {
    "I": "is isolated: it reads no PYTHONPATH",
    "E": "ignores the environment, and so PYTHONPATH",
    "S": "does not import site, and so no sitecustomize",
}
"""Options of Python with which nothing of ours runs in it, and why."""


def check_python_options(command: Sequence[str]) -> None:
    """Raises PadfreeError if a Python in a command is started with -I, -E or -S, which would go past the door."""
    for place, word in enumerate(command):
        if not _PYTHON.fullmatch(os.path.basename(word)):
            continue
        for letter in _options_of_python(command[place + 1 :]):
            if letter in _CLOSED:
                raise PadfreeError(
                    f"run: {word} -{letter} {_CLOSED[letter]}, so its models would not be patched; leave out "
                    f"-{letter}, or call padfree_patch.autopatch() in the program"
                )


def _options_of_python(words: Sequence[str]) -> str:
    """Returns the letters of the options before the program."""
    letters, rest = "", list(words)
    while rest and len(rest[0]) > 1 and rest[0][0] == "-" and rest[0] != "--":
        word = rest.pop(0)
        if word.startswith("--"):
            if word == "--check-hash-based-pycs" and rest:
                rest.pop(0)
            continue
        for place, letter in enumerate(word[1:], 1):
            letters += letter
            if letter in "cm":  # what follows is the program
                return letters
            if letter in "WX":  # whose value is the rest of the word, or the next one
                if place == len(word) - 1 and rest:
                    rest.pop(0)
                break
    return letters


def _interpreter_of(file: str) -> list[str]:
    """Returns the words of a script's first line, if that names an interpreter."""
    try:
        with open(file, "rb") as script:
            first = script.readline(512)
    except OSError:
        return []
    return first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
