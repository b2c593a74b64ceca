"""Checks an installed wheel. The nox session `wheel` runs it, away from the repository."""

import importlib
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path


def check_import_loads_no_torch() -> None:
    import padfree_patch  # noqa: F401

    loaded = {"torch", "transformers"} & set(sys.modules)
    assert not loaded, f"import padfree_patch imported {loaded}"


def check_installed_whole() -> None:
    for name in ("padfree_patch", "padfree_patch.patches.llama"):
        path = importlib.import_module(name).__file__
        assert path and "site-packages" in path, f"{name} comes from {path}"
    assert files("padfree_patch").joinpath("py.typed").is_file()
    for package, file in (("door", "startup/sitecustomize.py"), ("integrations", "ms_swift/padfree_plugin.py")):
        assert files(f"padfree_patch.{package}").joinpath(file).is_file(), file
    assert any(file.name.endswith(".jsonl") for file in files("padfree_patch.demo").iterdir())


def check_apply_stops_the_leak() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import padfree_patch

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    before = padfree_patch.verify(model)
    assert not before, before
    padfree_patch.apply(model)
    after = padfree_patch.verify(model)
    assert after, after


def check_command_line_needs_no_extra() -> None:
    script = Path(sys.executable).with_name("padfree-patch")
    for command in ([script], [sys.executable, "-I", "-m", "padfree_patch"]):
        found = subprocess.run([*command, "verify", "llama", "--tiny", "--json"], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["ok"], found.stdout


if __name__ == "__main__":
    for check in (
        check_import_loads_no_torch,
        check_installed_whole,
        check_apply_stops_the_leak,
        check_command_line_needs_no_extra,
    ):
        check()
        print(f"wheel: {check.__name__}: ok")
