"""The command that looks at the registered patches: list."""

from __future__ import annotations

import click

from .output import json_option, print_json


@click.command(name="list")
@json_option
def list_patches(as_json: bool) -> None:
    """List the architectures with a patch.

    Beside each, the transformers versions that it was tested on, and what the support table says of this one.
    """
    from .. import patching, versions
    from ..patching import support
    from ..registry import registry

    version = str(versions.transformers_version())
    rows = [
        {
            "model_type": patch.model_type,
            "tested": patch.transformers,
            **{name: support.status(version, patch.model_type, name) for name in patching.IMPLEMENTATIONS},
        }
        for patch in registry().patches()
    ]
    if as_json:
        print_json({"transformers": version, "patches": rows})
        return
    click.echo(f"{'':12} {'transformers':14} on {version}: {', '.join(patching.IMPLEMENTATIONS)}")
    for row in rows:
        words = ", ".join(row[name] for name in patching.IMPLEMENTATIONS)
        click.echo(f"{row['model_type']:12} {row['tested']:14} {words}")
