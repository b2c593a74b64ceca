"""Promise 3: copies, saved modules and replicas of a patched model are patched too, and independent of it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from packaging.version import Version

import padfree_patch
from helpers.models import assert_exact
from padfree_patch import PadfreeError
from padfree_patch.testing import conformance, examples
from padfree_patch.wrapping import seam
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions


def test_deepcopy_is_patched_and_independent(make, batch, alone):
    model = padfree_patch.apply(make())
    twin = copy.deepcopy(model)
    padfree_patch.restore(model)
    assert_exact(twin, batch, alone)
    with pytest.raises(AssertionError):
        assert_exact(model, batch, alone)
    padfree_patch.restore(twin)
    with pytest.raises(AssertionError):
        assert_exact(twin, batch, alone)


def test_saved_module_comes_back_patched(make, batch, alone):
    model = padfree_patch.apply(make())
    file = io.BytesIO()
    torch.save(model, file)
    padfree_patch.restore(model)
    assert not seam.installed
    file.seek(0)
    assert_exact(torch.load(file, weights_only=False), batch, alone)


def test_saved_module_comes_back_patched_in_another_process(llama, batch, tmp_path):
    alone = conformance.logits_alone(lambda: copy.deepcopy(llama), examples(conformance.LENGTHS))
    torch.save(padfree_patch.apply(llama), tmp_path / "model.pt")
    torch.save((batch, alone), tmp_path / "expected.pt")
    program = """
        import torch
        model = torch.load("model.pt", weights_only=False)
        batch, alone = torch.load("expected.pt")
        error = (model(**batch).logits - alone).abs().max() / alone.abs().max()
        assert error < 2e-5, error
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)


def another_version(monkeypatch):
    other = Version("4.99.1" if padfree_patch.versions.transformers(">=5") else "5.99.1")
    monkeypatch.setattr(padfree_patch.versions, "transformers_version", lambda: other)
    return other


@pytest.mark.parametrize("whole", [True, False], ids=["model", "opt-in"])
def test_what_was_saved_in_another_version_says_so(make, whole, monkeypatch):
    """Also where a class of then is gone, of which pickle says AttributeError."""
    model = padfree_patch.apply(make())
    saved = pickle.dumps(model if whole else OptIn.of(model))
    version, other = padfree_patch.versions.transformers_version(), another_version(monkeypatch)
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.delattr(sys.modules[attention.__module__], attention.__name__)
    says = rf"a patched {model.config.model_type} model was .* transformers {version}; this is transformers {other}"
    with pytest.raises(PadfreeError, match=says):
        pickle.loads(saved)
    monkeypatch.undo()
    pickle.loads(saved)  # the control


def test_patch_whose_class_is_gone_says_so(make, monkeypatch):
    model = padfree_patch.apply(make())
    saved = pickle.dumps(OptIn.of(model))
    monkeypatch.delattr(sys.modules[type(model).__module__], type(model).__name__)
    with pytest.raises(PadfreeError, match=f"model was pickled as a whole .*{type(model).__name__}"):
        pickle.loads(saved)


def test_opt_in_alone_can_be_pickled(llama):
    padfree_patch.apply(llama)
    saved = OptIn.of(llama)
    other = pickle.loads(pickle.dumps(saved))
    assert (other.backend, other.seams) == (saved.backend, saved.seams)


def test_replica_of_data_parallel_is_patched(make, batch, alone):
    """`replicate` needs GPUs; this is what it does to every module, with the parameters of the original."""
    model = padfree_patch.apply(make())
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
            setattr(replica, name, replicas.get(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
    replica = replicas[model]
    assert replica is not model
    assert_exact(replica, batch, alone)
