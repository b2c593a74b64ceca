"""The command line: `padfree-patch`, or `python -m padfree_patch`. Each command but `run` takes --json.

A file here has the commands of one kind. It imports torch and transformers only inside them, so that --help is quick.
"""

from __future__ import annotations

import sys

import click

from .. import __version__
from ..demo.command import demo
from ..door.command import run
from ..errors import PadfreeError
from .on_data import estimate
from .on_model import bench, explain, verify
from .registered import list_patches
from .show import show

COMMANDS = (explain, verify, show, bench, estimate, run, demo, list_patches)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Look at a model, check it, try it: padding-free training that is exact."""


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line: errors of ours are a line and exit status 2, others keep their traceback."""
    try:
        cli()
    except PadfreeError as error:
        click.echo(f"padfree-patch: {error}", err=True)
        sys.exit(2)
