"""Whether other programs took the CPU while a run was timed."""

from __future__ import annotations

import math
from pathlib import Path

# Share of its threads' time that a run may wait for a CPU before its speed is called unreliable. On two cores the demo
# waits 1-3 % when alone and 50-70 % beside two busy processes, where the ratio of the speeds came out from 0.4 to 15.
LIMIT = 0.05


def waited_seconds() -> float:
    """Seconds that this process's threads, added up, were ready to run and had no CPU; nan where not known (not Linux).

    The second number of schedstat, in nanoseconds (Linux, Documentation/scheduler/sched-stats.rst).
    """
    waited = []
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited.append(int(file.read_text().split()[1]))
        except OSError:  # the thread has just ended
            continue
    return sum(waited) / 1e9 if waited else math.nan
