"""Writes tests/attention/signatures.json: what varlen attention functions take, read from the sdists of packages.

    python tools/signatures.py flash-attn-*.tar.gz

The sdists of flash-attn carry FlashAttention-3 in hopper/. Nothing is installed or imported, so it needs no GPU.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
from pathlib import Path

WRITTEN = Path(__file__).parents[1] / "tests" / "attention" / "signatures.json"
FUNCTION = "flash_attn_varlen_func"
FILES = {"flash_attn": "flash_attn/flash_attn_interface.py", "flash_attn_3": "hopper/flash_attn_interface.py"}


def signature_in(source: str) -> list[list[str | None]] | None:
    """Names and defaults (as source text, None for none) of the varlen function's parameters."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == FUNCTION:
            names = [argument.arg for argument in node.args.args]
            defaults = [ast.unparse(default) for default in node.args.defaults]
            return [list(pair) for pair in zip(names, [None] * (len(names) - len(defaults)) + defaults)]
    return None


def main(sdists: list[str]) -> None:
    found = {}
    for sdist in sdists:
        version = re.search(r"-([^-]+)\.tar\.gz$", sdist)[1]
        with tarfile.open(sdist) as archive:
            top = archive.getnames()[0].split("/")[0]
            for package, file in FILES.items():
                try:
                    source = archive.extractfile(f"{top}/{file}").read().decode()
                except KeyError:
                    continue
                if signature := signature_in(source):
                    found[f"{package} of flash-attn {version}"] = signature
    lines = [f"  {json.dumps(name)}: {json.dumps(signature)}" for name, signature in found.items()]
    WRITTEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
