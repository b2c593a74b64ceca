"""One line of ours on the standard error of the first process of a run."""

from __future__ import annotations

import os
import sys

import torch
from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line, on rank 0 only; not into the middle of a progress bar."""
    if _rank() == 0:
        tqdm.write(f"padfree-patch: {' '.join(text.split())}", file=sys.stderr)


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    rank = os.environ.get("RANK", "0")  # what torchrun and accelerate set
    return int(rank) if rank.isdigit() else 0
