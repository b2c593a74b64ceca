"""Draws docs/upstream.md and columns of docs/support.md from what upstream_ways.py has measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matrix_on_versions import LAST_PATCHES

PAGE = Path(__file__).parents[1] / "docs" / "upstream.md"
FOUND = PAGE.with_name("upstream.json")
README = PAGE.parents[1] / "README.md"
BEGIN, END = "<!-- upstream:begin (tools/upstream_ways_page.py writes this table) -->", "<!-- upstream:end -->"

Words = Mapping[str, Sequence[str]]
"""exact, mixes, wrong or fails -> model types."""

SAYING = {"exact": "isolated", "mixes": "**mixes**", "wrong": "**wrong**", "fails": "fails"}

BARE, CACHELESS = "model(**batch)", "use_cache=False"
HEADINGS = {BARE: "upstream, `model(**batch)`", CACHELESS: "upstream, `use_cache=False`"}
"""Columns of the support tables."""

INTRODUCTION = """\
# What transformers does by itself

A packed row can reach a model in several ways, and upstream, without this package, does not do the same with all of
them. `nox -s ways` measured each way on tiny models of {count} registered architectures, as they are by default,
on {versions}: two examples in a row, against each example alone. Examples *mix* if the logits of one change when the
other is exchanged. [upstream.json](upstream.json) has it for programs.
`padfree_patch.explain(model)` measures the first two ways on a model of yours.

| way | the call |
|---|---|
| `model(**batch)` | `input_ids` and `position_ids` that restart; the config's `use_cache`, which is on |
| `use_cache=False` | the same, without a cache |
| a mask of ones | without a cache, and with an `attention_mask` that is all ones, as many collators add it |
| segment numbers | without a cache, and with an `attention_mask` that numbers the examples, as LLaMA-Factory's does |
| two rows | without a cache, two such rows in the batch |
| a padded end | without a cache, some tokens of padding at the end, and a mask that says so |
| lengths too, checkpointing | without a cache, also `cu_seq_lens_q` and its kind, training with checkpointing |
| lengths alone, checkpointing | the same without `position_ids` |

What a trainer does follows from that.
{trainer}
With gradient checkpointing every version trains without a cache. TRL's `SFTTrainer` passes `use_cache=False` in newer
versions (1.16 does, 0.9 does not). A loop of your own has the config's.

Where upstream isolates on sdpa and eager it builds a mask of tokens x tokens for it, which costs memory and time
([benchmarks](benchmarks.md)). On flash_attention_2 it calls the kernel for several lengths. That implementation ran on
the CPU here, with a stand-in for the flash-attn package, which shows what reaches the kernel.
"""


def merge(folder: Path) -> None:
    """Puts every FOLDER/VERSION.json into docs/upstream.json; versions that are not there keep what it says of them."""
    found = {**read(), **{path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}}
    lines = (f"{json.dumps(version)}: {json.dumps(found[version])}" for version in sorted(found, key=by_release))
    FOUND.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draw()


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    return found


def by_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def draw() -> None:
    found = read()
    PAGE.write_text(page(found))
    README.write_text(with_table(README.read_text(), readme_table(found)))


def with_table(text: str, table: str) -> str:
    """Returns the README's text with this table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the README has no place for the table"
    return f"{before}{begin}\n{table}\n{end}{after}"


def page(found: Mapping[str, Any]) -> str:
    """Returns the text of docs/upstream.md."""
    every = "the last patch release of every minor"
    versions = every if len(found) == len(LAST_PATCHES) else f"transformers {named(list(found))}"
    of_all = [words for each in found.values() for words in each["sdpa"][BARE].values()]
    count = len({model_type for model_types in of_all for model_type in model_types})
    lines = [INTRODUCTION.format(trainer=trainers(found), versions=versions, count=count)]
    for implementation in ("sdpa", "eager", "flash_attention_2"):
        ways = list(next(iter(found.values()))[implementation])
        lines += [
            f"## {implementation}",
            "",
            f"| transformers | {' | '.join(map(heading, ways))} |",
            "|---" * (len(ways) + 1) + "|",
        ]
        of_this = {version: each[implementation] for version, each in found.items()}
        lines += [f"| {versions} | {' | '.join(cells)} |" for versions, cells in alike(of_this, in_words) if any(cells)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def readme_table(found: Mapping[str, Any]) -> str:
    """Returns the README's table: what people meet first, on sdpa and on flash_attention_2."""
    columns = [("sdpa", way) for way in (BARE, CACHELESS, "a mask of ones", "segment numbers", "a padded end")]
    columns += [("flash_attention_2", way) for way in (BARE, "two rows", "a padded end")]
    headings = (f"{i.replace('flash_attention_2', 'FA2')}: {heading(way)}" for i, way in columns)
    lines = [f"| transformers | {' | '.join(headings)} |", "|---" * (len(columns) + 1) + "|"]
    chosen = {version: {f"{i} {way}": each[i][way] for i, way in columns} for version, each in found.items()}
    lines += [f"| {versions} | {' | '.join(cells)} |" for versions, cells in alike(chosen, mostly)]
    return "\n".join(lines)


def heading(way: str) -> str:
    return f"`{way}`" if way in (BARE, CACHELESS) else way


def mostly(words: Words) -> str:
    """Returns what most models do; "most" where a few do something else."""
    most = max(words, key=lambda word: len(words[word]), default="")
    return f"{SAYING[most]}{', most' * (len(words) > 1)}" if most else ""


def trainers(found: Mapping[str, Any]) -> str:
    """Says on which versions the Trainer calls without a cache, whatever the model's config says."""
    by_way: dict[str, list[str]] = {}
    for version, each in found.items():
        by_way.setdefault(each["trainer"], []).append(version)
    on, off = (named(by_way.get(way, [])) for way in (BARE, CACHELESS))
    return (
        f"transformers' Trainer leaves the config's `use_cache` on in {on or 'none of them'}, and switches it off in "
        f"{off or 'none of them'} (`TrainingArguments.use_cache` is False unless you say otherwise)."
    )


def alike(found: Mapping[str, Mapping[str, Words]], say: Callable[[Words], str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the versions in a row that read the same, newest first, and their cells."""
    runs: list[tuple[list[str], list[str]]] = []
    for version, row in found.items():
        cells = [say(words) for words in row.values()]
        if runs and runs[-1][1] == cells:
            runs[-1][0].append(version)
        else:
            runs.append(([version], cells))
    for versions, cells in reversed(runs):
        yield named(versions), cells


def named(versions: Sequence[str]) -> str:
    """Names versions: neighbours among the minors as `first to last`, whatever else one by one.

    >>> named(["4.53.3", "4.54.1", "4.55.4", "4.57.6"])
    '4.53.3 to 4.55.4, 4.57.6'
    """
    runs: list[list[str]] = []
    for version in versions:
        if runs and LAST_PATCHES.index(version) == LAST_PATCHES.index(runs[-1][-1]) + 1:
            runs[-1].append(version)
        else:
            runs.append([version])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def in_words(words: Words) -> str:
    """Returns what a cell says: what most models do, and the names of the others."""
    ordered = sorted(words.items(), key=lambda each: -len(each[1]))
    parts = [SAYING[ordered[0][0]]] if ordered else []
    parts += [f"{SAYING[word]}: {', '.join(names)}" for word, names in ordered[1:]]
    return "; ".join(parts)


def column(found: Mapping[str, Any], version: str, implementation: str, way: str) -> str:
    """Returns a cell of the support tables: how many architectures upstream keeps exact by itself."""
    words: Words = found.get(version, {}).get(implementation, {}).get(way, {})
    there = sum(map(len, words.values()))
    return f"{len(words.get('exact', ()))} of {there} exact" if there else ""
