"""Persimmon passes every check of padfree_patch.testing, and fails them unpatched."""

import pytest
from padfree_persimmon import PATCH

from padfree_patch import apply, verify
from padfree_patch.testing import CHECKS, FAIL_UNPATCHED, Unavailable, checkpointing, conformance, tiny_model


@pytest.fixture(params=["eager", "sdpa"])
def implementation(request):
    """The attention implementations that the installed transformers has for Persimmon."""
    try:
        tiny_model(PATCH, request.param)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.mark.parametrize("variant", ["default", *PATCH.variants])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_patched_model_passes(check, variant, implementation):
    """What a packed row gives is what each example gives alone, and ordinary calls stay as they were."""
    check(lambda: tiny_model(PATCH, implementation, **PATCH.variants.get(variant, {})))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_survive_checkpointing(reentrant, implementation):
    """What a row gives stays right where layers run again in the backward."""
    conformance.check_gradients(lambda: tiny_model(PATCH, implementation), prepare=checkpointing(reentrant=reentrant))


@pytest.mark.parametrize("check", FAIL_UNPATCHED, ids=lambda check: check.__name__)
def test_unpatched_model_fails(check, implementation):
    """Shows that the checks would notice a patch that does nothing."""
    with pytest.raises(AssertionError):
        check(lambda: tiny_model(PATCH, implementation), patched=False)


def test_apply_finds_the_patch(implementation):
    """Goes the way of a user, who never imports this package: through the entry point."""
    model = tiny_model(PATCH, implementation)
    assert not verify(model)
    assert verify(apply(model))
