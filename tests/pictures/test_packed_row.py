"""The picture of a packed row shows what the model does, token by token, and is of the model as it was verified."""

from __future__ import annotations

import functools
import pickle
import sys

import pytest
import torch
from matplotlib.colors import to_rgb

import padfree_patch
from padfree_patch import PadfreeError, versions
from padfree_patch.pictures.figure import NOTHING, OTHER, OWN
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model
from padfree_patch.verification import LENGTHS, look

A, B = LENGTHS
TRIANGLES = "\n".join(
    [
        *("x" * (i + 1) + "." * (A - 1 - i + B) for i in range(A)),
        *("." * A + "x" * (i + 1) + "." * (B - 1 - i) for i in range(B)),
    ]
)


@pytest.mark.versions
def test_a_patched_row_is_two_triangles_and_upstreams_is_one(llama):
    before = look(llama)
    assert before.mixed_pairs() == A * B and not before  # the control: model(**batch) mixes in every version
    assert str(before).replace("!", ".") == TRIANGLES
    after = look(padfree_patch.apply(llama))
    assert after and str(after) == TRIANGLES


@pytest.mark.versions
def test_a_window_shows():
    sliding = functools.partial(tiny_model, registry().get("mistral"), sliding_window=4, num_hidden_layers=1)
    model = sliding("eager" if versions.transformers("<4.37") else "sdpa")
    seen = [line.count("x") for line in str(look(padfree_patch.apply(model))).splitlines()]
    (window,) = set(padfree_patch.explain(model).windows)
    assert seen == [min(i + 1, window or A) for length in LENGTHS for i in range(length)]


def test_what_the_call_says_of_the_cache_is_measured(llama):
    if not versions.transformers(">=4.53"):
        pytest.skip("before 4.53 every call mixes")
    assert not look(llama) and look(llama, use_cache=False)


def test_looking_leaves_no_trace(llama):
    llama.train()
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    random = torch.random.get_rng_state()
    look(llama)
    assert llama.training and all(each.grad is None and each.requires_grad for each in llama.parameters())
    torch.testing.assert_close(llama.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random)


def colours(figure):
    """The colour of each cell, by letters."""
    letters = {to_rgb(OWN): "x", to_rgb(OTHER): "!", to_rgb(NOTHING): "."}
    (image,) = figure.axes[0].get_images()
    return "\n".join("".join(letters[tuple(map(float, cell))] for cell in row) for row in image.get_array())


def test_plot_draws_what_was_measured(llama):
    result = padfree_patch.verify(llama)
    figure = result.plot()
    assert colours(figure) == str(look(llama))
    assert "EXAMPLES MIX" in figure.axes[0].get_title() and "72 pairs" in figure.axes[0].get_title()
    padfree_patch.apply(llama)
    assert colours(padfree_patch.verify(llama).plot()) == TRIANGLES
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    with pytest.raises(PadfreeError, match=r"changed since it was verified \(examples mixed then\)"):
        result.plot()


def test_no_picture_is_said_with_its_reason(llama):
    result = padfree_patch.verify(llama)
    copy = pickle.loads(pickle.dumps(result))
    assert str(copy) == str(result)
    with pytest.raises(PadfreeError, match="the model that was verified is gone"):
        copy.plot()
    with torch.no_grad():
        llama.lm_head.weight.fill_(float("nan"))
    with pytest.raises(PadfreeError, match="gradients are not finite"):
        result.plot()
    with torch.device("meta"):
        away = type(llama)(llama.config)
    with pytest.raises(PadfreeError, match="on the meta device"):
        padfree_patch.verify(away).plot()


def test_without_matplotlib_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PadfreeError, match=r"pip install 'padfree_patch\[pictures\]'"):
        padfree_patch.verify(llama).plot()
