"""What to switch on in the tool that runs, so that its batches are packed and say where their examples end."""

from __future__ import annotations

import sys

_NOT_PACKED = "no row held a second example: this run is not packed"
_NO_BOUNDARIES = (
    "the rows are full, and nothing says where an example ends (no positions that restart, no lengths, no segment "
    "numbers, no padding). If a row holds several examples, they mix, and no patch can know"
)

_TOOLS = {
    "llamafactory": ("packing: true", "neat_packing: true (or packing: true of version 0.9.5 or newer)"),
    "swift": ("--packing true or --padding_free true", "--packing true of ms-swift 3 or newer"),
    "axolotl": ("sample_packing: true", "sample_packing: true, and no pretraining_dataset"),
    "trl": (
        "padding_free=True or packing=True in its config (--padding_free, --packing)",
        "packing_strategy='bfd' instead of 'wrapped' (--packing_strategy bfd); of a TRL without it, "
        "packing=False and data_collator=padfree_patch.DataCollatorWithFlattening()",
    ),
    "transformers": (
        "data_collator=padfree_patch.DataCollatorWithFlattening()",
        "padfree_patch.pack_dataset, or data_collator=padfree_patch.DataCollatorWithFlattening()",
    ),
}
"""What to switch on for batches that are not packed, and for full rows without boundaries, by the package of a tool;
those that use the next ones come first."""


def what_to_switch_on(*, full_rows: bool) -> str:
    """Says what the batches of a run lack, and what to switch on in the tool that runs in this process."""
    tool = next((each for each in _TOOLS if each in sys.modules), "transformers")
    unpacked, bounded = _TOOLS[tool]
    problem, remedy = (_NO_BOUNDARIES, bounded) if full_rows else (_NOT_PACKED, unpacked)
    return f"{problem}. In {tool}, switch on {remedy}"
