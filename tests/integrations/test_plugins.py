"""The plug-ins of tools that have a slot for one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.resources import files

import pytest
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from helpers.door import made
from padfree_patch import patching


@pytest.fixture(autouse=True)
def _as_before():
    """ms-swift's file keeps no handle, and a later test's Trainer would verify its model."""
    entered = [(PreTrainedModel, "from_pretrained"), (PreTrainedModel, "_from_config")]
    entered.append((CallbackHandler, "on_train_begin"))
    before = [(owner, name, vars(owner)[name]) for owner, name in entered]
    yield
    for owner, name, own in before:
        setattr(owner, name, own)


def test_axolotls_plug_in_patches_the_models_that_come_after_it(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "padfree_patch.integrations.axolotl", raising=False)
    plugin = importlib.import_module("padfree_patch.integrations.axolotl").PadfreePlugin()
    assert isinstance(plugin, base.BasePlugin) and not patching.is_applied(made())
    for _ in range(2):  # the model, and a reference model
        plugin.pre_model_load({})
        assert patching.is_applied(made())
    plugin.post_train_unload({})
    assert not patching.is_applied(made())


def test_ms_swifts_external_plugin_patches_the_models_that_come_after_it():
    file = files("padfree_patch.integrations") / "ms_swift" / "padfree_plugin.py"
    assert [each.name for each in file.parent.iterdir() if each.suffix == ".py"] == [
        file.name
    ]  # ms-swift puts the folder on sys.path
    spec = importlib.util.spec_from_file_location("_swift_external_1", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert patching.is_applied(made())
