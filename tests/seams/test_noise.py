"""NEFTune in packed rows: each example gets the noise that it gets alone."""

from __future__ import annotations

import types

import pytest
import torch

from helpers.training import flattening, trainer_of
from padfree_patch import PadfreeError, applied, apply
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = pytest.mark.versions

LENGTHS = (40, 10, 30)
ALPHA = 5.0


def hook_of_upstream(module, args, output):
    """transformers' hook, which has moved between its versions."""
    try:
        from transformers.integrations import neftune_post_forward_hook
    except ImportError:
        from transformers.trainer_utils import neftune_post_forward_hook
    return neftune_post_forward_hook(module, args, output)


def hooked(embeddings):
    embeddings.neftune_noise_alpha = ALPHA
    embeddings.register_forward_hook(hook_of_upstream)


def replaced(embeddings):
    """NEFTune's original code."""
    forward = embeddings.forward

    def noised(self, ids):
        output = forward(ids)
        size = ALPHA / (output.size(1) * output.size(2)) ** 0.5
        return output + torch.zeros_like(output).uniform_(-size, size)

    embeddings.forward = types.MethodType(noised, embeddings)


@pytest.mark.parametrize("add_noise", [hooked, replaced])
def test_noise_of_a_packed_row_is_that_of_each_example_alone(make, add_noise):
    model = make().train()
    add_noise(model.get_input_embeddings())
    texts = examples(LENGTHS)
    torch.manual_seed(0)
    alone = torch.cat([model(input_ids=each).logits for each in texts], dim=1)
    with applied(model, verify=False):
        torch.manual_seed(0)
        packed = model(**pack(texts)).logits
    assert conformance.largest(packed - alone) / conformance.largest(alone) < conformance.LOGIT_TOLERANCE


@pytest.mark.parametrize("patched", [True, False])
def test_amplitude_in_the_trainer_is_that_of_each_length(tmp_path, patched):
    """Unpatched, the control, it is that of the row for all."""
    model = tiny_model(registry().get("llama"), "sdpa")
    seen = []
    texts = [{"input_ids": torch.arange(3, 3 + n).tolist()} for n in LENGTHS]
    options = {"per_device_train_batch_size": 3, "max_steps": 1, "neftune_noise_alpha": ALPHA, "learning_rate": 0.0}
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    weight = model.get_input_embeddings().weight
    trainer_of(apply(model, verify=False) if patched else model, tmp_path, keep_order, dataset=texts, **options).train()
    noise = (seen[0][0] - weight[torch.cat([torch.tensor(each["input_ids"]) for each in texts])]).abs().detach()
    sizes = torch.stack([each.max() for each in noise.split(LENGTHS)])
    expected = ALPHA / (torch.tensor(LENGTHS) * weight.shape[1]).sqrt()
    share = sizes / expected
    if patched:
        assert ((share > 0.95) & (share <= 1.0001)).all()
    else:
        torch.testing.assert_close(share, (torch.tensor(LENGTHS) / sum(LENGTHS)).sqrt(), rtol=0.05, atol=0)


def keep_order(features):
    """The examples of the batch by their length's place, which the Trainer has shuffled."""
    return flattening()(sorted(features, key=lambda each: LENGTHS.index(len(each["input_ids"]))))


def test_embeddings_that_were_computed_for_the_row_are_refused(llama):
    model = apply(llama).train()
    batch = pack(examples(LENGTHS))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    model(inputs_embeds=embeds, **batch)  # the control: without noise they are fine
    hooked(model.get_input_embeddings())
    with pytest.raises(PadfreeError, match=r"NEFTune's noise is scaled by the length.*pass input_ids"):
        model(inputs_embeds=embeds, **batch)
