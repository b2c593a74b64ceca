"""The one place that asks what is installed, and in which version."""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version


def transformers(specifier: str) -> bool:
    """Says whether the running transformers is in a range such as ">=4.36,<5.24"."""
    return inside(transformers_version(), specifier)


def torch(specifier: str) -> bool:
    """Says whether the running torch is in a range such as ">=2.5"; "2.13.0+cpu" counts as 2.13.0."""
    return inside(_required("torch"), specifier)


@functools.cache
def installed(package: str) -> Version | None:
    """Finds the installed version of a distribution, or None. Local parts ("2.13.0+cpu") are kept."""
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def transformers_version() -> Version:
    """Gives the version of the running transformers."""
    return _required("transformers")


def _required(package: str) -> Version:
    version = installed(package)
    assert version is not None, f"padfree_patch depends on {package}"
    return version


@functools.cache
def inside(version: Version, specifier: str) -> bool:
    """Says whether a version is in a range such as ">=4.36,<5.24"; release candidates count as their release.

    >>> inside(Version("4.36.0rc1"), ">=4.36,<5.24"), inside(Version("4.100"), "<4.46")
    (True, False)
    """
    return SpecifierSet(specifier).contains(version.base_version)
