"""The command `padfree-patch run`."""

from __future__ import annotations

import click

from ..errors import PadfreeError
from .start import start


class _OneLineErrors(click.Command):
    """A command whose wrong options are an error of one line, as all of ours are."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise PadfreeError(f"{self.name}: {error.format_message()}") from error


@click.command(cls=_OneLineErrors, context_settings={"allow_interspersed_args": False})
@click.option("--backend", default="auto", show_default=True, help="Attention backend of packed rows.")
@click.option("--allow-unpatched", is_flag=True, help="Only warn of packed rows for a model that can't be patched.")
@click.option("--print-env", is_flag=True, help="Print the two variables that COMMAND would get, for other hosts.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(command: tuple[str, ...], backend: str, allow_unpatched: bool, print_env: bool) -> None:
    """Run COMMAND, with its models patched and verified.

    COMMAND is as in "padfree-patch run trl sft --packing ...", its options its own. Every Python that it starts is
    reached: torchrun, accelerate, spawned workers.
    """
    start(command, backend=backend, allow_unpatched=allow_unpatched, print_env=print_env)
