"""The registry, and what every registered patch must have."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil

import pytest
from packaging.specifiers import SpecifierSet

from helpers.models import PATCHES
from matrix_on_versions import FIRST_OF_ERA, LAST_OF_ERA
from padfree_patch import PadfreeError, Patch, registry, versions
from padfree_patch.patching import support

pytestmark = pytest.mark.versions

ENDS_OF_ERAS = {*FIRST_OF_ERA, *LAST_OF_ERA}


def patch_named(model_type: str) -> Patch:
    return Patch(model_type=model_type, attention="A", decoder="M", transformers=">=4.36")


def test_second_registration_of_a_name_prints_what_is_registered():
    found = registry.Registry([patch_named("one"), patch_named("two")])
    with pytest.raises(PadfreeError, match=r"'two' is registered already: Patch\(.*; registered: one, two"):
        found.register(patch_named("two"))
    assert found.model_types() == ["one", "two"]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.model_type)
def test_patch_is_frozen(patch):
    with pytest.raises(dataclasses.FrozenInstanceError):
        patch.model_type = "other"
    with pytest.raises(TypeError):
        patch.tiny["hidden_size"] = 1
    hash(patch)


class EntryPoint:
    def __init__(self, name, result):
        self.name, self.value, self._result = name, f"package.{name}:PATCH", result

    def load(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.mark.parametrize(
    ("entry_points", "message"),
    [
        ([EntryPoint("a", ImportError("no module b"))], "entry point a = package.a:PATCH does not load: no module b"),
        ([EntryPoint("a", 7)], "entry point a = package.a:PATCH is no Patch: 7"),
        ([EntryPoint("a", patch_named("x")), EntryPoint("b", patch_named("x"))], "'x' is registered already"),
    ],
)
def test_broken_entry_points_are_named(monkeypatch, entry_points, message):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entry_points)
    with pytest.raises(PadfreeError, match=message):
        registry.registry.__wrapped__()


def test_every_file_under_patches_is_an_entry_point():
    import padfree_patch.patches

    files = {module.name for module in pkgutil.iter_modules(padfree_patch.patches.__path__)}
    assert files <= set(registry.registry().model_types())


def test_third_partys_patch_is_found(monkeypatch):
    ours = list(importlib.metadata.entry_points(group=registry.ENTRY_POINT_GROUP))
    theirs = EntryPoint("theirs", patch_named("theirs"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*ours, theirs])
    assert "theirs" in registry.registry.__wrapped__().model_types()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.model_type)
def test_every_patch_module_is_an_entry_point_and_says_what_it_was_read_against(patch):
    module = importlib.import_module(f"padfree_patch.patches.{patch.model_type}")
    assert module.PATCH is patch
    assert module.__doc__ is not None
    name = patch.model_type.removesuffix("_text")
    assert f"models/{name}/modeling_{name}.py of transformers" in module.__doc__
    assert SpecifierSet(patch.transformers)


NO_CONFIG = {("cohere2", "5.4.0"), ("olmo", "5.4.0"), ("olmo2", "5.4.0"), ("olmo3", "5.4.0")}
"""Whose config upstream can't build."""
NOT_CAUSAL_ALONE = {("llama4_text", "4.54.1"), ("llama4_text", "4.55.4")}
"""Upstream's, unpatched: `apply` refuses them, and says so."""


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.model_type)
def test_every_patch_has_its_row_in_the_support_table(patch):
    """For every minor from 4.34 to 5.24: wrong and refused nowhere, exact where the patch says so, else absent.

    A new patch has been tried on the ends of each era at least.
    """
    table = support.table()
    assert len(table) == 49
    assert all(patch.model_type in table[version] for version in ENDS_OF_ERAS)
    for version, row in table.items():
        words = set(row.get(patch.model_type, {}).values())
        if not words and version not in ENDS_OF_ERAS:
            continue
        if (patch.model_type, version) in NOT_CAUSAL_ALONE:
            assert words == {"refused", "upstream fails"}, version
            continue
        assert words <= {"exact", "native-exact", "upstream fails", "absent"}, version
        if not versions.inside(versions.Version(version), patch.transformers):
            assert words <= {"absent", "upstream fails"}, version
        elif (patch.model_type, version) not in NO_CONFIG:
            assert words & {"exact", "native-exact"}, version
