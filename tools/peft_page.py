"""Writes docs/peft.md from what tools/peft_methods.py found on several PEFTs."""

from __future__ import annotations

from pathlib import Path


def write_page(folder: Path) -> None:
    """Writes the page."""
