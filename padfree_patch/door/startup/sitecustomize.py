"""Runs at the start of every Python below `padfree-patch run`, whose PYTHONPATH begins with this folder.

Waits, with the standard library alone, for somebody to import transformers. Then it executes the sitecustomize that it
hides, if there is one, as Python would have done.
"""

import os
import sys


class _Waiting:
    """Finds nothing. Opens the door when transformers is about to be imported, each time until that succeeds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            sys.meta_path.remove(self)
            try:
                _open_door()
            except ImportError:  # which whoever only asks whether transformers is there may ignore
                sys.meta_path.insert(0, self)
                raise


def _open_door() -> None:
    variable = os.environ.get("PADFREE_PATCH_RUN", "")
    try:
        from padfree_patch.door import hooks

        hooks.open_door(variable)
    except Exception as error:
        problem = (
            f"padfree-patch: nothing can be patched in {sys.executable}: {type(error).__name__}: {error}. Install "
            "padfree_patch there"
        )
        if "strict=0" not in variable.split(","):
            raise ImportError(f"{problem}, or pass --allow-unpatched to padfree-patch run") from error
        print(problem, file=sys.stderr)


def _run_the_hidden_one() -> None:
    from importlib.machinery import PathFinder

    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [each for each in sys.path if os.path.abspath(each) != here])
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec

    module = sys.modules["sitecustomize"] = module_from_spec(spec)
    spec.loader.exec_module(module)


if "transformers" in sys.modules:  # imported by a .pth file of the environment, which comes before
    _open_door()
else:
    sys.meta_path.insert(0, _Waiting())
_run_the_hidden_one()
