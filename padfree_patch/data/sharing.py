"""Which examples of a batch begin with the same tokens that nobody is trained on, and the row in which they stand once.

The row has what examples share, without its last token, right before the first of them; each of them is that last
token and what follows it. So every label is predicted inside its own sequence, as if the example stood there whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..arguments import Integers
from ..batch.labels import IGNORED_LABEL
from ..batch.prefixes import NONE
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from .fields import LABEL_MASKS, Feature, Mask, Numbers


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the examples of a batch stand in its row."""

    lengths: list[int]
    """Tokens per sequence."""
    prefixes: list[int] | None = None
    """For each sequence the number of the one that it goes on from, -1 for none; None if none does."""
    places: Integers | None = None
    """int64 (T,): which token each one of the row is, of the examples end to end; None if it is the same one."""

    def take(self, parts: Sequence[npt.NDArray[np.generic]]) -> Numbers:
        """Returns a field of the row, (T,), from that of the examples, (tokens,) each."""
        joined: Numbers = np.concatenate(parts)
        return joined if self.places is None else joined[self.places]

    def sequences(self, padding: int) -> PackedSequences:
        """Returns the sequences of the row, the last of them its padding if there is any."""
        if not padding:
            return PackedSequences.from_lengths(self.lengths, prefixes=self.prefixes)
        prefixes = None if self.prefixes is None else [*self.prefixes, NONE]
        return PackedSequences.from_lengths([*self.lengths, padding], padding=padding, prefixes=prefixes)


def check_can_share(*, return_seq_idx: bool, token_fields: Sequence[str]) -> None:
    """Raises PadfreeError for arguments of a collator that contradict `share_prefixes`."""
    if return_seq_idx:
        raise PadfreeError(
            "return_seq_idx=True gives each token the number of its example, and those that share_prefixes=True shares "
            "belong to several; leave one of the two out"
        )
    if "position_ids" in token_fields:
        raise PadfreeError(
            "share_prefixes=True counts positions itself, so that examples go on from what they share; leave "
            "position_ids out of token_fields, or share nothing"
        )


def check_labelled(features: Sequence[Feature]) -> None:
    """Raises PadfreeError if nothing says which tokens of a batch are not trained on."""
    if not any(feature.get(name) is not None for feature in features for name in ("labels", *LABEL_MASKS)):
        raise PadfreeError(
            "share_prefixes=True shares tokens that nobody is trained on, but no example has labels, so that each "
            f"token is trained on; give labels that are {IGNORED_LABEL} where an example begins, or a completion_mask"
        )


def layout_of(lengths: Sequence[int], unlabelled: Mask, fields: Sequence[Numbers]) -> Layout:
    """Returns the layout of a row in which examples share what they can, with the fewest tokens.

    Args:
        lengths: tokens per example.
        unlabelled: bool (tokens,) of the examples end to end, whether a token is one that nobody is trained on.
        fields: the tokens, and whatever else has a value per token: (tokens,) each. What is shared is the same in all.
    """
    begins = np.cumsum([0, *lengths[:-1]])
    ends = begins + lengths
    keys = _numbered(fields)
    heads = [keys[begin:end][: _leading(unlabelled[begin:end])] for begin, end in zip(begins, ends)]
    shared: dict[int, tuple[int, int]] = {}  # by example: its group, and the tokens that its group shares
    for number, (members, tokens) in enumerate(_groups(heads)):
        shared |= dict.fromkeys(members, (number, tokens))
    if not shared:
        return Layout(list(lengths))
    return _laid_out(begins.tolist(), ends.tolist(), shared)


def _laid_out(begins: list[int], ends: list[int], shared: dict[int, tuple[int, int]]) -> Layout:
    pieces: list[range] = []
    prefixes: list[int] = []
    prompts: dict[int, int] = {}  # by group: the number of its prompt's sequence
    for example, (begin, end) in enumerate(zip(begins, ends)):
        group, tokens = shared.get(example, (NONE, 1))
        if group >= 0 and group not in prompts:
            prompts[group] = len(pieces)
            pieces.append(range(begin, begin + tokens - 1))
            prefixes.append(NONE)
        pieces.append(range(begin + tokens - 1, end))
        prefixes.append(prompts.get(group, NONE))
    return Layout([len(each) for each in pieces], prefixes, np.concatenate([np.array(each) for each in pieces]))


def _numbered(fields: Sequence[Numbers]) -> Integers:
    """Returns int64 (tokens,): a number for each token, the same for two that have the same values in all fields."""
    keys = np.zeros(len(fields[0]), dtype=np.int64)
    for field in fields:
        values, numbers = np.unique(field, return_inverse=True)
        _, keys = np.unique(keys * len(values) + numbers.reshape(-1), return_inverse=True)
        keys = keys.reshape(-1).astype(np.int64)
    return keys


def _leading(unlabelled: Mask) -> int:
    """Returns how many tokens of an example come before the first one that somebody is trained on."""
    return len(unlabelled) if unlabelled.all() else int(unlabelled.argmin())


def _groups(heads: Sequence[Integers]) -> list[tuple[list[int], int]]:
    """Returns the groups of examples that share the beginning of their heads, and how many tokens each group shares.

    >>> _groups([np.array([5, 6, 7]), np.array([8]), np.array([5, 6, 9, 9])])
    [([0, 2], 2)]
    """
    order = sorted(range(len(heads)), key=lambda i: heads[i].astype(">i8").tobytes())
    common = [_common(heads[a], heads[b]) for a, b in itertools.pairwise(order)]
    _, found = _best(common, 0, len(order))
    return [([order[i] for i in range(first, stop)], tokens) for first, stop, tokens in found]


def _common(a: Integers, b: Integers) -> int:
    """Returns how many tokens two heads have in common from the first one on."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def _best(common: Sequence[int], first: int, stop: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Returns the most tokens that examples [first, stop) can save, and the groups that save them.

    A group is (first, stop, tokens that it shares). The examples are sorted, and the i-th and the next have `common[i]`
    tokens in common. Either all of them share what all have in common, or they are parted where they have least in
    common, and each part does its best.
    """
    if stop - first < 2:
        return 0, []
    least = min(common[first : stop - 1])
    together = (stop - first - 1) * (least - 1)
    cuts = [first, *(i + 1 for i in range(first, stop - 1) if common[i] == least), stop]
    parts = [_best(common, a, b) for a, b in itertools.pairwise(cuts)]
    saved = sum(each for each, _ in parts)
    if together > saved:
        return together, [(first, stop, least)]
    return max(saved, 0), [group for _, groups in parts for group in groups]
