"""Runs tools on their own command lines without and with `padfree-patch run`, and measures whether examples mix.

python tools/door.py [WORD...]     the runs whose names hold all words, or all; `nox -s door` calls it

The probe of tools/door_probe measures what each model really received. Findings go into docs/tools.json, from which the
table of docs/tools.md is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from door_page import write_page
from door_runs import HERE, RUNS, Run
from pins import DOOR, NOT_BESIDE_THIS_TORCH

FOLDER = Path(".nox", "door").resolve()
FOUND = Path("docs", "tools.json")
UV = str(Path(sys.executable).with_name("uv"))
TOOLS = ("trl", "llamafactory", "ms-swift", "axolotl", "transformers")
VERIFIED = re.compile(r"^padfree-patch: .* verified on ", re.MULTILINE)

Finding = dict[str, Any]


def prepare(environment: str) -> None:
    """Makes an environment, with the package in it, and what its runs train."""
    where = FOLDER / environment
    python = str(where / "bin" / "python")
    pip = [UV, "pip", "install", "--quiet", "--python", python]
    subprocess.run([UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(where)], check=True)
    subprocess.run([*pip, *DOOR[environment], "-e", "."], check=True)
    subprocess.run([UV, "pip", "uninstall", "--quiet", "--python", python, *NOT_BESIDE_THIS_TORCH], check=True)
    assets = FOLDER / f"{environment}-texts"
    shutil.rmtree(assets, ignore_errors=True)
    made = subprocess.run([python, HERE / "door_assets.py", assets], check=True, text=True, stdout=subprocess.PIPE)
    (assets / "ids.txt").write_text(made.stdout.splitlines()[-1])
    # No words of TRL's command line say None, which its padding_free asks for.
    (assets / "run.yaml").write_text("max_length: null\n" if environment == "trl" else "{}\n")


def environment_of(run: Run, probe: Path) -> dict[str, str]:
    end, padding = (FOLDER / f"{run.environment}-texts" / "ids.txt").read_text().split()
    stand_ins = [str(HERE.parent / "tests" / "helpers" / "stand_ins")] if run.flash_attention else []
    path = [str(HERE / "door_probe"), str(HERE / "door_stubs"), *stand_ins]
    ours = {
        "PATH": os.pathsep.join([str(FOLDER / run.environment / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path),
        "DOOR_PROBE": str(probe),
        "DOOR_END": end,
        "DOOR_PADDING": padding,
        "DOOR_FLASH_ATTENTION": str(HERE.parent / "tests") if run.flash_attention else "",
    }
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["DO_NOT_TRACK"] = "1"
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    return {**kept, **quiet, **ours}


def execute(run: Run, *, door: bool) -> Finding:
    """Runs a tool, and returns what the probe measured, and what was printed."""
    number = RUNS.index(run)
    out = FOLDER / "runs" / f"{number}-{'with' if door else 'without'}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    probe, texts = out / "probe.jsonl", str(FOLDER / f"{run.environment}-texts")
    words = run.command_with_door if door else run.command
    command = [word.replace("FOLDER", texts).replace("OUT", str(out / "model")) for word in words]
    environment = environment_of(run, probe)
    command[0] = str(shutil.which(command[0], path=environment["PATH"]))
    done = subprocess.run(
        command, env=environment, cwd=out, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
    )
    (out / "log.txt").write_text(done.stdout)
    trainings = [json.loads(line) for line in probe.read_text().splitlines()] if probe.exists() else []
    return {**summary(trainings), "status": done.returncode, **printed(done.stdout)}


def summary(trainings: list[Finding]) -> Finding:
    """Returns the worst that all ranks measured."""
    calls = [call for training in trainings for call in training["calls"]]
    if not calls:
        return {"processes": len(trainings)}
    packed = [call for call in calls if call["examples"] > call["rows"]]
    return {
        "processes": len(trainings),
        "packed": bool(packed),
        "change": max(call["change"] for call in calls),
        "alone": max(call["alone"] for call in calls),
        "labels": max((call["labels"] for call in calls if call["labels"] is not None), default=None),
        "given": sorted({name for call in calls for name in call["given"]}),
        "losses": min(trainings, key=lambda each: each["rank"])["losses"],
    }


def printed(text: str) -> Finding:
    """Returns what the door said, and the last error; not that of a parent about its child, which names paths."""
    said = [line.removeprefix("padfree-patch: ") for line in text.splitlines() if line.startswith("padfree-patch: ")]
    errors = [line for line in text.splitlines() if re.match(r"^(?!subprocess)[\w.]*(Error|Exception): ", line)]
    return {"verified": len(VERIFIED.findall(text)), "said": said, "error": errors[-1] if errors else ""}


def versions_of(environment: str) -> dict[str, str]:
    code = f"""
import importlib.metadata, json
names = {{each.metadata["Name"].lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}}
print(json.dumps({{name: names[name] for name in {TOOLS!r} if name in names}}))
"""
    python = str(FOLDER / environment / "bin" / "python")
    return json.loads(subprocess.run([python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout)


def main(*words: str) -> None:
    chosen = [run for run in RUNS if all(word in run.name for word in words)]
    for environment in dict.fromkeys(run.environment for run in chosen):
        prepare(environment)
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for run in chosen:
        found[run.key] = finding = {
            "versions": versions_of(run.environment),
            "without": execute(run, door=False),
            "with": execute(run, door=True),
        }
        print(run.name, json.dumps(finding, indent=1), flush=True)
        found = {each.key: found[each.key] for each in RUNS if each.key in found}  # no run of yesterday's stays
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    write_page(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
