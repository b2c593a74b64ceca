"""Prompts that several examples of a row share: which sequence goes on from which.

A prompt stands once, without its last token, as a sequence of its own. Each example that shares it is another sequence,
which begins with that last token and sees the prompt too. So every label is predicted inside its own sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..arguments import whole_numbers
from ..errors import PadfreeError

Prefixes = tuple[int, ...]
"""For each sequence the number of the one that it goes on from; `NONE` for none."""

NONE = -1


def checked_prefixes(prefixes: Iterable[int] | None, sequences: int) -> Prefixes | None:
    """Returns the prefixes of so many sequences; None if no sequence goes on from another.

    Raises PadfreeError unless each is `NONE` or the number of an earlier sequence that has none itself.
    """
    if prefixes is None:
        return None
    given: Prefixes = tuple(whole_numbers(prefixes, "prefixes").tolist())
    if len(given) != sequences:
        raise PadfreeError(f"there are {sequences} sequences, but {len(given)} prefixes; it takes one for each")
    for sequence, prefix in enumerate(given):
        if prefix == NONE:
            continue
        if not 0 <= prefix < sequence:
            raise PadfreeError(f"sequence {sequence} has prefix {prefix}; it must be an earlier sequence, or {NONE}")
        if given[prefix] != NONE:
            raise PadfreeError(
                f"sequence {sequence} goes on from sequence {prefix}, which goes on from {given[prefix]}; a prompt "
                "must begin by itself"
            )
    return given if any(prefix != NONE for prefix in given) else None


def prefix_lengths(lengths: Sequence[int], prefixes: Prefixes | None) -> tuple[int, ...]:
    """Returns for each sequence the tokens of the one that it goes on from, 0 where it goes on from none."""
    if prefixes is None:
        return (0,) * len(lengths)
    return tuple(0 if prefix == NONE else lengths[prefix] for prefix in prefixes)
