"""verify: finds leaks, names the first module that leaks, leaves the model as it was."""

from __future__ import annotations

import time

import pytest
import torch

import padfree_patch
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model

pytestmark = pytest.mark.versions


def test_finds_the_leak_of_upstream_and_its_first_module(make):
    model = make()
    result = padfree_patch.verify(model)
    assert not result
    assert not result.isolated
    assert result.logit_change > 1e-3
    assert result.leaked_gradient > 1e-6
    assert result.first_leak == "model.layers.0.self_attn"
    assert "EXAMPLES MIX" in str(result)


def test_patched_model_is_isolated(make):
    with padfree_patch.applied(make()) as model:
        result = padfree_patch.verify(model)
    assert result
    assert (result.logit_change, result.leaked_gradient) == (0, 0)
    assert result.alone_error <= result.alone_tolerance == pytest.approx(2e-5, rel=0.05)
    assert "do not mix" in str(result)


def test_names_a_leak_outside_attention(llama):
    """The layer looks one token back, over the boundary."""

    class LooksBack(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * x.roll(1, dims=1)

    llama.model.layers[1].mlp = torch.nn.Sequential(llama.model.layers[1].mlp, LooksBack())
    with padfree_patch.applied(llama, verify=False):
        result = padfree_patch.verify(llama)
        assert not result
        assert result.first_leak == "model.layers.1.mlp.1"
    with pytest.raises(padfree_patch.LeakError, match=r"first module that leaks +model\.layers\.1\.mlp\.1"):
        padfree_patch.apply(llama)


def test_isolated_examples_with_wrong_logits_are_not_ok(llama):
    """Examples do not mix, but give something else than alone: only the third probe sees it."""
    llama.model.norm.register_forward_hook(lambda module, args, output: output * (1 + 0.01 * (output.shape[1] > 10)))
    with padfree_patch.applied(llama, verify=False):
        result = padfree_patch.verify(llama)
    assert result.isolated
    assert not result.ok
    assert "WRONG RESULT" in str(result)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_leaves_everything_as_it_was(make, training, grad_mode):
    model = make(attention_dropout=0.1).train(training)
    model.lm_head.eval()  # modes differ per module
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    model.requires_grad_(False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    padfree_patch.apply(model)
    with grad_mode():
        assert padfree_patch.verify(model)
    padfree_patch.restore(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert torch.equal(model.model.norm.weight.grad, torch.ones_like(model.model.norm.weight))


def test_leaves_a_rotary_that_grows_as_it_was():
    config = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4}
    model = tiny_model(registry().get("llama"), "sdpa", **config)
    rotaries = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    before = [dict(vars(rotary)) for rotary in rotaries]
    padfree_patch.verify(model)
    assert [dict(vars(rotary)) for rotary in rotaries] == before


def test_takes_under_a_second(llama):
    start = time.perf_counter()
    padfree_patch.verify(llama)
    assert time.perf_counter() - start < 1


def test_runs_the_model_five_times(llama):
    """Two packed rows and their gradients, and two examples alone: no row twice for what is compared with it."""
    calls = []
    llama.model.register_forward_hook(lambda module, args, output: calls.append(output))
    with padfree_patch.applied(llama, verify=False):
        assert padfree_patch.verify(llama)
    assert len(calls) == 5


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_model_that_is_blind_to_its_tokens_shows_nothing(llama, patched):
    """No example can reach another in what it gives, with the patch or without: that is no isolation."""
    torch.nn.init.zeros_(llama.model.embed_tokens.weight)
    if patched:
        padfree_patch.apply(llama, verify=False)
    result = padfree_patch.verify(llama)
    assert not result
    assert "do not depend on the tokens" in result.skipped


def test_says_why_nothing_was_measured():
    with torch.device("meta"):
        model = tiny_model(registry().get("llama"))
    result = padfree_patch.verify(model)
    assert not result
    assert result.skipped == "parameter model.embed_tokens.weight is on the meta device"
    assert "not verified" in str(result)
    assert not padfree_patch.verify(torch.nn.Linear(1, 1))


def test_works_in_half_precision_and_under_autocast(make):
    with padfree_patch.applied(make().to(torch.bfloat16)) as model:
        assert padfree_patch.verify(model)
    with padfree_patch.applied(make()) as model, torch.autocast("cpu", torch.bfloat16):
        assert padfree_patch.verify(model)


def norms_in_float32(model):
    for parameter in model.to(torch.bfloat16).parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model


def test_runs_a_model_that_needs_autocast_under_autocast(make, batch):
    """PEFT's prepare_model_for_kbit_training makes such models."""
    model = norms_in_float32(make())
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=batch["input_ids"])
    with torch.autocast("cpu", torch.bfloat16):
        assert not padfree_patch.verify(model)
    with padfree_patch.applied(model):
        assert padfree_patch.verify(model)


def test_runs_every_layer_as_in_training(make):
    """Without gradients a layer may take another path: bitsandbytes' 4-bit ones then rewrite their weights."""
    model, with_gradients = make(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: with_gradients.append(inputs[0].requires_grad))
    padfree_patch.apply(model.requires_grad_(False))
    with torch.no_grad():
        padfree_patch.verify(model)
    assert with_gradients and all(with_gradients)
    with torch.no_grad():  # the control
        model(input_ids=torch.arange(3, 9).unsqueeze(0))
    assert not all(with_gradients)


def test_measures_only_the_decoder_if_the_head_gives_one_result_per_row(llama):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(llama.config)
    assert not padfree_patch.verify(model)
    with padfree_patch.applied(model):
        assert padfree_patch.verify(model)


def test_bound_in_half_precision_is_the_models_own_rounding():
    """A router that rounding flips moves the logits by a fifth, packed or not; a dense model by a hundredth."""

    def bound_of(model_type, **config):
        model = tiny_model(registry().get(model_type), "eager", **config).bfloat16()
        with padfree_patch.applied(model):
            return padfree_patch.verify(model)

    routed, dense = bound_of("mixtral", initializer_range=0.5), bound_of("llama")
    assert routed and routed.alone_tolerance > 0.3  # its error is 0.03 to 0.2, by how a processor adds
    assert dense and dense.alone_tolerance < 0.07


def test_logits_that_are_off_by_more_than_rounding_are_wrong_in_half_precision(llama):
    """Off by 8%: isolated to the bit, so that only the comparison with alone shows it."""

    def scale(module, args, kwargs, output):
        packed = kwargs.get("position_ids") is not None
        return output | {"logits": output.logits * 1.08} if packed else output

    with padfree_patch.applied(llama.bfloat16()) as model:
        model.register_forward_hook(scale, with_kwargs=True)
        result = padfree_patch.verify(model)
    assert result.isolated and not result
    assert result.alone_tolerance < result.alone_error < 0.1
