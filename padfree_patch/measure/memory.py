"""Reads how much memory this process holds, and the most it has held."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
"""Has the peak as VmHWM, which starts at zero with the program and can be reset.

ru_maxrss, the portable figure, is wrong on Linux: a forked process inherits its parent's peak, and the peak cannot be
reset after loading.
"""


def resident_bytes() -> int:
    """Returns how much memory of this process is in RAM now."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Forgets the peak so far, on Linux. Elsewhere the peak stays that of the whole process, loading included."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the most memory that this process had in RAM since `reset_peak`."""
    if STATUS.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
