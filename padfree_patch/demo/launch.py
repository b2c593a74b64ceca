"""Starts a worker process and follows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results import Run

LAST_LINES = 15  # of a failed worker's log, shown with the error


class WorkerFailed(RuntimeError):
    """A worker ended without a result; the message has the end of its log."""


def run_worker(
    job: dict[str, Any], *, name: str, folder: Path, log: Path, follow: Callable[[dict[str, Any]], None]
) -> Run:
    """Run one job in a new process and hand every message it sends on the way to `follow`."""
    job_file = folder / f"{name}.json"
    job_file.write_text(json.dumps(job))
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    with open(log, "w", encoding="utf-8") as log_file:
        run = None
        with subprocess.Popen(
            [sys.executable, "-m", "padfree_patch.demo.worker", str(job_file)],
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            env=os.environ | threads,
        ) as process:
            assert process.stdout is not None  # it is a pipe
            try:
                for line in process.stdout:
                    message = json.loads(line)
                    if "run" in message:
                        run = Run.from_json(message["run"])
                    else:
                        follow(message)
            except BaseException:  # Ctrl-C too: no worker outlives the demo
                process.kill()
                raise
    if run is None or process.returncode != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise WorkerFailed(f"the {name} run stopped with exit code {process.returncode}; the end of {log}:\n{end}")
    return run
