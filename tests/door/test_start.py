"""`padfree-patch run`: the command runs as without it, and every Python of it waits for transformers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from padfree_patch import PadfreeError, attention, cli
from padfree_patch.door.options import BACKENDS, STARTUP, VARIABLE, Options, variables
from padfree_patch.door.start import check_python_options

PYTHON = sys.executable


def python(*arguments, folder, door=True, **environment):
    """Runs a Python as a child of `padfree-patch run` would be."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
    given |= variables(Options(), given) if door else {}
    return subprocess.run(
        [PYTHON, *arguments], env={**given, **environment}, capture_output=True, text=True, cwd=folder
    )


def run(monkeypatch, capfd, *arguments):
    """Runs the command line in this process; returns its exit status and what it wrote to standard error."""
    monkeypatch.setattr("sys.argv", ["padfree-patch", "run", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "padfree-patch: run: no command; write it behind the options, as in padfree-patch run trl sft ..."),
        (["--"], 2, "padfree-patch: run: no command; write it behind the options, as in padfree-patch run trl sft ..."),
        (["--backend", "fast", "true"], 2, "padfree-patch: unknown backend 'fast'; choose one of auto, flash_attn_3,"),
        (["--bakend", "sdpa", "true"], 2, "padfree-patch: run: No such option '--bakend'"),
        (["--backend"], 2, "padfree-patch: run: Option '--backend' requires an argument"),
        (["--print-env", "true"], 2, "padfree-patch: run --print-env takes no command"),
        (["no-such-command"], 127, "padfree-patch: run: no-such-command: not found"),
        (["./no-such-command"], 127, "padfree-patch: run: ./no-such-command: not found"),
        ([os.curdir + os.sep], 126, "padfree-patch: run: ./: not executable"),
        (["python", "-I", "x.py"], 2, "padfree-patch: run: python -I is isolated: it reads no PYTHONPATH"),
        (["--", PYTHON, "-uE", "x.py"], 2, "-E ignores the environment, and so PYTHONPATH, so its models would not be"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_status(monkeypatch, capfd, arguments, status, message):
    found, error = run(monkeypatch, capfd, *arguments)
    assert (found, error.count("\n")) == (status, 1), error
    assert message in error


@pytest.mark.parametrize(
    ("command", "letter"),
    [
        ("python3.11 -u -S train.py", "S"),
        ("env X=1 /usr/bin/python -W ignore -X dev -BI -m trl", "I"),
        ("/usr/bin/python3 -sE /usr/bin/tool", "E"),
        ("python -Wignore -E -c pass", "E"),
        ("torchrun --no-python python -I train.py", "I"),
    ],
)
def test_options_of_python_that_go_past_the_door_are_found(command, letter):
    with pytest.raises(PadfreeError, match=f"-{letter} .* leave out -{letter}, or call padfree_patch.autopatch"):
        check_python_options(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "python -u train.py -I",
        "python -m pip -I",
        "python -c -I",
        "python -W E x.py",
        "trl -I",
        "python",
        "python - -E",
    ],
)
def test_what_is_no_option_of_python_is_let_through(command):
    check_python_options(command.split())


def test_script_whose_first_line_isolates_python_is_refused(monkeypatch, capfd, tmp_path):
    script = tmp_path / "tool"
    script.write_text(f"#!{PYTHON} -sE\n")
    script.chmod(0o755)
    status, error = run(monkeypatch, capfd, str(script))
    assert status == 2 and f"{PYTHON} -E ignores the environment" in error


def test_the_command_gets_its_options_and_gives_its_exit_status(tmp_path):
    program = "import os, sys; print(sys.argv[1:], os.getpid(), flush=True); sys.exit(7)"
    child = subprocess.Popen(
        [PYTHON, "-m", "padfree_patch", "run", "--allow-unpatched", PYTHON, "-c", program, "--backend", "x", "--help"],
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = child.communicate()
    assert child.returncode == 7
    assert output == f"['--backend', 'x', '--help'] {child.pid}\n"


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="Windows has none")
def test_the_command_is_ended_by_a_closed_pipe_as_without_the_door():
    """Python ignores SIGPIPE; the control is what it would hand on."""
    look = ["sh", "-c", "kill -s PIPE $$; echo still here"]
    assert subprocess.run(look, capture_output=True, restore_signals=False).stdout == b"still here\n"
    done = subprocess.run([PYTHON, "-m", "padfree_patch", "run", "--", *look], capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGPIPE, b"")


def test_variables_are_printed_for_other_hosts(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"/some where{os.pathsep}{STARTUP}")
    monkeypatch.setattr("sys.argv", ["padfree-patch", "run", "--backend", "sdpa", "--allow-unpatched", "--print-env"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    expected = f"PYTHONPATH='{STARTUP}:/some where'\n{VARIABLE}=backend=sdpa,strict=0\n"
    assert capfd.readouterr().out == expected
    monkeypatch.setenv("PYTHONPATH", "")
    assert variables(Options(), os.environ)["PYTHONPATH"] == str(STARTUP)  # an empty part would be the current folder


@pytest.mark.parametrize("options", [Options(), Options("sdpa", strict=False)])
def test_options_are_read_as_they_were_written(options):
    assert Options.read(str(options)) == options


def test_variable_that_somebody_else_wrote_is_refused():
    for text in ("1", "backend=fast,strict=1", "strict=yes"):
        with pytest.raises(PadfreeError):
            Options.read(text)


def test_backends_are_those_that_there_are():
    assert list(BACKENDS) == attention.names()


FAKE = """
import sys
from types import SimpleNamespace

class PreTrainedModel:
    @classmethod
    def from_pretrained(cls, name):
        return name

    @classmethod
    def _from_config(cls, config):
        return config
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a transformers of two files, so that no torch has to be imported."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("count = globals().get('count', 0) + 1\n")
    (tmp_path / "transformers" / "modeling_utils.py").write_text(FAKE)
    return tmp_path


LOOK = """
import os, sys
import transformers.modeling_utils as there
import transformers
assert sys.modules["transformers"] is transformers and transformers.count == 1
assert not any(type(each).__name__ == "_Waiting" for each in sys.meta_path)
print(os.path.basename(there.PreTrainedModel.from_pretrained.__func__.__code__.co_filename))
"""
HOOKED, NOT_HOOKED = "hooks.py\n", "modeling_utils.py\n"


def test_transformers_is_entered_when_it_is_imported(folder):
    assert python("-c", LOOK, folder=folder).stdout == HOOKED
    assert python("-c", LOOK, folder=folder, door=False).stdout == NOT_HOOKED  # the control


def test_children_are_entered_too(folder):
    (folder / "look.py").write_text(LOOK)
    (folder / "spawn.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing, runpy, subprocess, sys

            if __name__ == "__main__":
                subprocess.run([sys.executable, "look.py"], check=True)
                worker = multiprocessing.get_context("spawn").Process(target=runpy.run_path, args=("look.py",))
                worker.start()
                worker.join()
            """
        )
    )
    assert python("spawn.py", folder=folder).stdout == HOOKED * 2


def test_sitecustomize_of_the_user_runs_as_without_the_door(folder):
    (folder / "sitecustomize.py").write_text("import sys\nsys.path.append('/added')\nprint('theirs', __file__)\n")
    look = "import sys, sitecustomize; assert '/added' in sys.path; print(sitecustomize.__file__)\n" + LOOK
    theirs = folder / "sitecustomize.py"
    expected = f"theirs {theirs}\n{theirs}\n"
    assert python("-c", look, folder=folder).stdout == expected + HOOKED
    assert python("-c", look, folder=folder, door=False).stdout == expected + NOT_HOOKED


def test_errors_of_their_sitecustomize_are_shown_as_without_the_door(folder):
    (folder / "sitecustomize.py").write_text("1 / 0\n")
    with_door, without = (python("-c", LOOK, folder=folder, door=door) for door in (True, False))
    assert with_door.stderr == without.stderr and "ZeroDivisionError" in without.stderr
    assert with_door.stdout == HOOKED


def test_a_python_without_the_package_is_an_error_and_no_silent_run(folder):
    (folder / "padfree_patch.py").write_text("raise ModuleNotFoundError('No module named padfree_patch')\n")
    result = python("-c", LOOK, folder=folder)
    assert result.returncode == 1
    assert f"ImportError: padfree-patch: nothing can be patched in {PYTHON}: ModuleNotFound" in result.stderr
    assert "Install padfree_patch there, or pass --allow-unpatched" in result.stderr
    allowed = python("-c", LOOK, folder=folder, **{VARIABLE: str(Options(strict=False))})
    assert allowed.stdout == NOT_HOOKED and "nothing can be patched" in allowed.stderr
    assert python("-c", "print(1)", folder=folder).stdout == "1\n"  # one that needs no transformers


def test_a_python_without_the_package_stays_an_error_for_whoever_ignored_the_first(folder):
    """As libraries do that look for transformers with find_spec, or in a try."""
    (folder / "padfree_patch.py").write_text("raise ModuleNotFoundError('No module named padfree_patch')\n")
    look = "import importlib.util\ntry:\n    importlib.util.find_spec('transformers')\nexcept ImportError:\n    pass\n"
    result = python("-c", look + LOOK, folder=folder)
    assert result.returncode == 1 and result.stdout == ""
    assert "ImportError: padfree-patch: nothing can be patched in" in result.stderr
    assert python("-c", look + LOOK, folder=folder, door=False).stdout == NOT_HOOKED


def test_transformers_that_the_environment_imports_before_is_entered(folder):
    """As a .pth file may, which Python reads before sitecustomize; here, by calling our sitecustomize late."""
    early = f"import runpy, transformers.modeling_utils; runpy.run_path({str(STARTUP / 'sitecustomize.py')!r})\n"
    assert python("-c", early + LOOK, folder=folder, door=False, **{VARIABLE: str(Options())}).stdout == HOOKED


def test_a_python_that_never_imports_transformers_starts_as_quickly(folder):
    def seconds(door):
        start = time.perf_counter()
        python("-c", "pass", folder=folder, door=door)
        return time.perf_counter() - start

    both = [(seconds(True), seconds(False)) for _ in range(5)]
    assert min(each[0] for each in both) - min(each[1] for each in both) < 0.15
    loaded = python("-c", "import sys; print(*sys.modules)", folder=folder).stdout.split()
    assert not {"padfree_patch", "wrapt", "torch", "importlib.metadata", "asyncio"} & set(loaded)


def test_importing_the_package_opens_no_door():
    program = "import sys; before = list(sys.meta_path); import padfree_patch; assert sys.meta_path == before"
    program += "; assert 'wrapt' not in sys.modules"
    subprocess.run([PYTHON, "-c", program], check=True)
