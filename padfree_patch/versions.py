"""The one place that asks what is installed, and in which version."""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version


@functools.cache
def installed(package: str) -> Version | None:
    """The installed version of a distribution, or None. Local parts ("2.13.0+cpu") are kept."""
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def transformers_version() -> Version:
    """The running transformers; it is a hard dependency, so it is always there."""
    version = installed("transformers")
    assert version is not None
    return version


def inside(version: Version, specifier: str) -> bool:
    """Whether a version is in a range such as ">=4.36,<5.25"; release candidates count as their release."""
    return SpecifierSet(specifier).contains(version.base_version)
