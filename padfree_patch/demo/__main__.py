"""Runs the demo: `python -m padfree_patch.demo`."""

from .command import demo

if __name__ == "__main__":
    demo(prog_name="python -m padfree_patch.demo")
