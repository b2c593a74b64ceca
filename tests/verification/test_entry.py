"""verify calls what the user calls: wrappers with token ids, whatever they do with them, and compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import padfree_patch
from padfree_patch import LeakError, PadfreeError

pytestmark = pytest.mark.versions


class Actor(nn.Module):
    """As trainers of reinforcement learning have them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class CountsPositionsItself(Actor):
    def forward(self, input_ids, position_ids=None, attention_mask=None):
        real = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, attention_mask=real, position_ids=real.cumsum(1) - 1)


class LooksForTheEnd(Actor):
    """Counts from the last end-of-text token of a row, as activated LoRA does from its invocation tokens."""

    def forward(self, input_ids, **options):
        after_the_end = (input_ids == self.model.config.eos_token_id).long().cumsum(1)
        return self.model(input_ids=input_ids, **options).logits * (1 + after_the_end[..., None])


class MixesByIds(Actor):
    def forward(self, input_ids, **options):
        return self.model(input_ids=input_ids, **options).logits + input_ids.cumsum(1)[..., None]


class TakesOtherNames(Actor):
    def forward(self, sequences, num_actions):
        return self.model(input_ids=sequences).logits


class GivesLogProbs(Actor):
    def forward(self, input_ids, **options):
        logits = self.model(input_ids=input_ids, **options).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def test_a_wrapper_that_takes_a_mask_only_is_called_with_segment_numbers(make):
    assert padfree_patch.verify(padfree_patch.apply(Actor(make())))
    assert not padfree_patch.verify(Actor(make()))


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (CountsPositionsItself, "EXAMPLES MIX"),
        (LooksForTheEnd, "WRONG RESULT"),
        (MixesByIds, "EXAMPLES MIX"),
    ],
)
def test_what_a_wrapper_does_with_token_ids_is_seen(llama, wrapper, message):
    padfree_patch.apply(llama)  # the control: the model itself is right
    padfree_patch.restore(llama)
    with pytest.raises(LeakError, match=message):
        padfree_patch.apply(wrapper(llama))


def test_a_wrapper_that_no_probe_fits_names_the_model_inside(llama):
    message = r"GivesLogProbs\.forward gives.* \(1, 17\), tensors of other shapes: \(1, 16\).*, \.model$"
    with pytest.raises(PadfreeError, match=message):
        padfree_patch.apply(GivesLogProbs(llama))
    assert not padfree_patch.patching.is_applied(llama)
    assert padfree_patch.apply(GivesLogProbs(llama).model)


def test_a_wrapper_that_takes_other_names_is_no_model_to_verify(llama):
    message = r"TakesOtherNames\.forward takes sequences, num_actions, and no input_ids.*inside it, \.model$"
    with pytest.raises(PadfreeError, match=message):
        padfree_patch.verify(TakesOtherNames(llama))


def subclass_of(model, forward):
    """Makes an equal model of a subclass with another forward."""
    subclass = type("Sub", (type(model),), {"forward": forward})
    new = subclass(model.config).eval()
    new.load_state_dict(model.state_dict())
    return new


def test_subclasses_are_called_by_their_own_signature(llama):
    def takes_no_embeddings(self, input_ids, position_ids=None, attention_mask=None, labels=None):
        return super(type(self), self).forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, labels=labels
        )

    assert padfree_patch.apply(subclass_of(llama, takes_no_embeddings))


def test_embeddings_that_look_at_the_row_are_seen(llama):
    """The graph begins behind them; what they mix, the logits show."""
    llama.model.embed_tokens.register_forward_hook(lambda module, args, output: output.cumsum(1))
    with padfree_patch.applied(llama, verify=False):
        result = padfree_patch.verify(llama)
    assert result.logit_change > 1e-3 and not result


def test_a_model_that_computes_embeddings_past_its_module_is_called_with_embeddings(llama):
    """So that the gradient probe has somewhere to begin."""

    class Past(Actor):
        def forward(self, input_ids=None, inputs_embeds=None, **options):
            if inputs_embeds is None:
                inputs_embeds = nn.functional.embedding(input_ids, self.model.model.embed_tokens.weight)
            return self.model(inputs_embeds=inputs_embeds, **options).logits

    assert not padfree_patch.verify(Past(llama)).isolated
    assert padfree_patch.verify(Past(llama)).leaked_gradient > 0
    assert padfree_patch.apply(Past(llama))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 compiles what is inside")
def test_compiled_models_are_checked_without_compiling(llama):
    from torch._dynamo.utils import counters

    padfree_patch.apply(llama)
    actor = Actor(llama)
    actor.model = torch.compile(llama, backend="eager")
    llama.compile(backend="eager")
    counters.clear()
    assert padfree_patch.verify(actor) and padfree_patch.verify(llama)
    assert not counters["stats"]


def test_arguments_that_go_by_position_only_are_passed_so(llama, batch):
    class ByPosition(type(llama)):
        def forward(self, input_ids, attention_mask=None, /, position_ids=None, **options):
            return super().forward(input_ids, attention_mask, position_ids, **options)

    llama.__class__ = ByPosition
    expected = llama(batch["input_ids"]).logits
    padfree_patch.apply(llama)
    assert torch.equal(llama(batch["input_ids"]).logits, expected)
    ids = batch.pop("input_ids")
    assert not torch.equal(llama(ids, **batch).logits, expected)  # the control: this row is packed


def test_an_embedding_inside_a_wrapper_is_drawn_from(llama):
    """PEFT 0.7 shows no weight of what it puts around modules to save."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids)

    llama.set_input_embeddings(Wrapper(llama.get_input_embeddings()))
    assert padfree_patch.verify(padfree_patch.apply(llama))
