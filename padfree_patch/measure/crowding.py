"""Measures whether other programs took the CPU while a run was timed."""

from __future__ import annotations

import math
from pathlib import Path

LIMIT = 0.05
"""Share of its threads' time that a run may wait for a CPU before its speed is called unreliable.

On two cores the demo waits 1-3 % when alone, and 50-70 % beside two busy processes. Beside those, the measured ratio of
the speeds was anything from 0.4 to 15.
"""


def waited_seconds() -> float:
    """Adds up the seconds that this process's threads were ready to run and had no CPU; nan outside Linux.

    Reads the second number of schedstat, in nanoseconds (Linux, Documentation/scheduler/sched-stats.rst).
    """
    waited = []
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited.append(int(file.read_text().split()[1]))
        except OSError:  # the thread has just ended
            continue
    return sum(waited) / 1e9 if waited else math.nan
