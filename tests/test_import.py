"""Importing the package is cheap: it imports no modeling file."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.versions


def test_importing_the_package_imports_no_model_code():
    program = "import padfree_patch, sys; assert not any(m.startswith('transformers.models.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
