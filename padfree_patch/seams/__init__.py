"""Where upstream is entered: a file for each kind of place.

A kind has a `NAME`, `find`, which looks where a model has such places and checks that upstream's code is what it must
be, and `answer`, which is what happens there. A new kind is one file here and its name in `KINDS`.
"""

from __future__ import annotations

from . import adapters, attention, decoder, flash_attn, generation, head, interface, key_bias, mask, rotary
from .kinds import Kind

KINDS: tuple[Kind, ...] = (
    decoder,
    head,
    generation,
    attention,
    interface,
    flash_attn,
    mask,
    key_bias,
    rotary,
    adapters,
)
"""In the order in which their checks speak up."""
