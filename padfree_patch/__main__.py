"""Runs the command line: `python -m padfree_patch`."""

from .cli import main

if __name__ == "__main__":
    main()
