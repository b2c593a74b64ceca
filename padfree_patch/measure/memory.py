"""How much memory this process holds, and the most it has held."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

# ru_maxrss would be the portable answer and is the wrong one on Linux: a process inherits the peak of the parent it was
# forked from, and the mark cannot be set back after loading. VmHWM starts at zero with the program and can be reset.
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Forget the peak so far (Linux). Elsewhere the peak stays that of the whole process, loading included."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory this process had in RAM since `reset_peak`."""
    if STATUS.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
