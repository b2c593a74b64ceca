"""Estimates from lengths alone what padding costs on a data set, and what leaving it out would save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from ..arguments import Integers, whole_number, whole_numbers
from ..errors import PadfreeError
from ..html_table import html_table

SHUFFLES = 5
"""Epochs in random order over which batches are averaged."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What batches of a data set hold, drawn in random order and padded to their longest example."""

    examples: int
    batch_size: int
    mean_tokens: float
    """Tokens per example."""
    longest: int
    """Tokens of the longest example."""
    padding_share: float
    """Part of the padded batches that is padding."""
    expected_speedup: float
    """Padded over real tokens: how much faster a step gets if its time is proportional to its tokens."""
    attention_saved: float
    """Part of the padded batches' attention work that is saved; work is proportional to length squared."""
    tokens_per_step: float
    """Real tokens per batch, on average: the length of a padding-free row."""
    tokens_per_step_p99: int
    """Of 100 batches, 99 have at most so many real tokens."""
    padded_tokens_per_step: float
    """Tokens per padded batch, on average."""
    padded_tokens_per_step_p99: int
    """Of 100 padded batches, 99 have at most so many tokens."""
    shared_speedup: float | None = None
    """Real tokens over those of rows in which each prompt stands once (`share_prompts`, `share_prefixes`): how much
    faster than without padding a step gets if its time is proportional to its tokens; None if no prompts were given."""

    def as_dict(self) -> dict[str, object]:
        """Gives every field, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join([*self._heading(), *(f"  {name:21} {found}" for name, found in self._figures())])

    def _repr_html_(self) -> str:
        """Shows the figures as a table in a notebook."""
        return html_table("; ".join(self._heading()), self._figures())

    def _heading(self) -> tuple[str, str]:
        return (
            f"{self.examples} examples of {self.mean_tokens:.0f} tokens on average, at most {self.longest}",
            f"batches of {self.batch_size} in random order, padded to the longest:",
        )

    def _figures(self) -> list[tuple[str, str]]:
        shared = ("shared prompts", f"{self.shared_speedup or 1:6.2f} x more, if each is computed once")
        return [
            ("padding", f"{self.padding_share:7.1%} of the tokens"),
            ("expected speed-up", f"{self.expected_speedup:6.2f} x without it, if time goes with tokens"),
            ("attention work saved", f"{self.attention_saved:7.1%}"),
            (
                "tokens per step",
                f"{self.tokens_per_step:7.0f} real, {self.padded_tokens_per_step:.0f} padded "
                f"(99 of 100: up to {self.tokens_per_step_p99} and {self.padded_tokens_per_step_p99})",
            ),
            *([shared] if self.shared_speedup else []),
        ]


def estimate(
    lengths: Iterable[int],
    *,
    batch_size: int,
    seed: int = 0,
    prompt_lengths: Iterable[int] | None = None,
    group_size: int = 2,
) -> Estimate:
    """Estimates what padding costs on examples of these lengths, and what leaving it out would save.

    Args:
        lengths: tokens per example, as trained on (cut to the longest that is allowed).
        batch_size: examples per batch; an incomplete last batch is left out.
        seed: of the random order.
        prompt_lengths: tokens of each prompt that a group of examples begins with, to estimate what computing it once
            saves; None for none.
        group_size: examples on each prompt, one after another in `lengths`: 2 for pairs, or the answers of a group.

    Raises PadfreeError if there are fewer examples than a batch needs, one is empty, these are no whole numbers, or a
    prompt is longer than an example that begins with it.

    >>> estimate([10, 30], batch_size=2).expected_speedup
    1.5
    >>> estimate([10, 30], batch_size=2, prompt_lengths=[9]).shared_speedup  # 40 tokens, or 8 + 2 + 22
    1.25
    """
    tokens = whole_numbers(lengths, "lengths")
    batch_size, seed = whole_number(batch_size, "batch_size", 1), whole_number(seed, "seed", 0)
    if len(tokens) < batch_size:
        raise PadfreeError(f"a batch of {batch_size} can't be drawn from {len(tokens)} examples")
    if tokens.min() < 1:
        raise PadfreeError(f"example {int(tokens.argmin())} has {tokens.min()} tokens; leave empty examples out")
    saved = None if prompt_lengths is None else _saved_by_sharing(tokens, prompt_lengths, group_size)
    generator = np.random.default_rng(seed)
    whole = len(tokens) // batch_size * batch_size
    batches = np.concatenate([generator.permutation(tokens)[:whole].reshape(-1, batch_size) for _ in range(SHUFFLES)])
    real, padded = batches.sum(1), batch_size * batches.max(1)
    return Estimate(
        examples=len(tokens),
        batch_size=batch_size,
        mean_tokens=float(tokens.mean()),
        longest=int(tokens.max()),
        padding_share=float(1 - real.sum() / padded.sum()),
        expected_speedup=float(padded.sum() / real.sum()),
        attention_saved=float(1 - (batches**2).sum() / (batch_size * batches.max(1) ** 2).sum()),
        tokens_per_step=float(real.mean()),
        tokens_per_step_p99=int(np.percentile(real, 99)),
        padded_tokens_per_step=float(padded.mean()),
        padded_tokens_per_step_p99=int(np.percentile(padded, 99)),
        shared_speedup=None if saved is None else float(tokens.sum() / (tokens.sum() - saved)),
    )


def _saved_by_sharing(tokens: Integers, prompt_lengths: Iterable[int], group_size: int) -> int:
    """Returns the tokens that are saved if groups of examples share their prompts, all tokens of them except the last.

    Raises PadfreeError if there are not as many prompts as groups, or one is not longer than an example.
    """
    prompts, size = whole_numbers(prompt_lengths, "prompt_lengths"), whole_number(group_size, "group_size", 2)
    if len(prompts) * size != len(tokens):
        raise PadfreeError(
            f"{len(prompts)} prompts with {size} examples on each don't make {len(tokens)} examples; group_size is the "
            "number of examples on each prompt"
        )
    wrong = np.flatnonzero((prompts < 1) | (prompts > tokens.reshape(-1, size).min(1)))
    if len(wrong):
        group = int(wrong[0])
        raise PadfreeError(
            f"prompt {group} has {prompts[group]} tokens, but the examples on it have "
            f"{tokens.reshape(-1, size)[group].tolist()}; their lengths are those of prompt and answer together"
        )
    return int((size - 1) * (prompts - 1).sum())
