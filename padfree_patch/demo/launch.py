"""Starts a worker process and follows it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .job import Job, Message
from .results import Run

LAST_LINES = 15
"""Lines of a failed worker's log that the error shows."""


class WorkerFailed(RuntimeError):
    """A worker ended without a result; the message has the end of its log."""


def run_worker(job: Job, *, name: str, folder: Path, log: Path, follow: Callable[[Message], None]) -> Run:
    """Runs one job in a new process, and passes each message about its progress to `follow`.

    Raises WorkerFailed if the process ends without a result.
    """
    job_file = folder / f"{name}.json"
    job_file.write_text(json.dumps(dataclasses.asdict(job)))
    run, code = _follow(job_file, job.threads, log, follow)
    if run is None or code != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise WorkerFailed(f"the {name} run stopped with exit code {code}; the end of {log}:\n{end}")
    return run


def _follow(job_file: Path, threads: int, log: Path, follow: Callable[[Message], None]) -> tuple[Run | None, int]:
    """Runs a worker to its end; returns its result, if it sent one, and its exit code."""
    run = None
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (
        open(log, "w", encoding="utf-8") as log_file,
        subprocess.Popen(
            [sys.executable, "-m", "padfree_patch.demo.worker", str(job_file)],
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            env=environment,
        ) as process,
    ):
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
    return run, process.returncode
