"""Promise 1: whoever may look at what the last layer computes finds all tokens there, labelled or not."""

from __future__ import annotations

import functools
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from helpers.labelled import assert_same_step, training_step
from helpers.last_layer import is_narrowed, make, packed_batch
from padfree_patch import PadfreeError, apply


def hook_on(path, of_last=None):
    """Puts a hook on a module, or on a part of the last one in a list."""

    def prepare(model):
        module = model.get_submodule(path)
        module = module if of_last is None else module[-1].get_submodule(of_last)
        module.register_forward_hook(lambda module, args, output: None)
        return nullcontext()

    return prepare


def backward_hook(model):
    model.model.layers[-1].mlp.up_proj.register_full_backward_hook(lambda module, given, taken: None)
    return nullcontext()


def global_hook(model):
    return nn.modules.module.register_module_forward_hook(lambda module, args, output: None)


def own_forward(of):
    def prepare(model):
        module = of(model.model)
        forward = module.forward
        module.forward = lambda hidden_states: forward(hidden_states)
        return nullcontext()

    return prepare


def own_class(of):
    def prepare(model):
        module = of(model.model)

        class Own(type(module)):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        module.__class__ = Own
        return nullcontext()

    return prepare


def wrapped(name, of):
    """Puts a function around that of a class which says that it is the same one, as functools.wraps makes it."""

    @contextmanager
    def patched(model):
        holder = type(of(model.model))
        function, own = getattr(holder, name), vars(holder).get(name)
        setattr(holder, name, functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs)))
        try:
            yield
        finally:
            delattr(holder, name)
            if own is not None:
                setattr(holder, name, own)

    return patched


def own_activation(model):
    model.model.layers[-1].mlp.act_fn = nn.Sequential(own := nn.SiLU())
    own.forward = lambda x: nn.functional.silu(x)
    return nullcontext()


def weights_of_their_own_type(model):
    linear = model.model.layers[-1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(type("Quantised", (torch.Tensor,), {})))
    return nullcontext()


def function_as_activation(model):
    mlp = model.model.layers[-1].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: nn.functional.silu(x)
    return nullcontext()


def own_list_of_layers(model):
    """Which may go through them twice."""
    model.model.layers = type("Looped", (nn.ModuleList,), {})(model.model.layers)
    return nullcontext()


def last_layer_in_another(model):
    """Which runs it twice."""

    class Around(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.attention_type = layer, getattr(layer, "attention_type", None)

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs)

    model.model.layers[0] = Around(model.model.layers[-1])
    return nullcontext()


def saved_tensors_are_looked_at(model):
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


READERS = {
    "hook on a linear layer of the MLP": hook_on("model.layers", "mlp.down_proj"),
    "hook on the MLP": hook_on("model.layers", "mlp"),
    "hook on attention": hook_on("model.layers", "self_attn"),
    "hook on the layer": hook_on("model.layers", ""),
    "hook on the last norm": hook_on("model.norm"),
    "hook on the decoder": hook_on("model"),
    "backward hook": backward_hook,
    "hook on all modules": global_hook,
    "forward of the MLP on the instance": own_forward(lambda decoder: decoder.layers[-1].mlp),
    "forward of a linear layer on the instance": own_forward(lambda decoder: decoder.layers[-1].mlp.down_proj),
    "forward of the projection on the instance": own_forward(lambda decoder: decoder.layers[-1].self_attn.o_proj),
    "class of the MLP": own_class(lambda decoder: decoder.layers[-1].mlp),
    "class of the last norm": own_class(lambda decoder: decoder.norm),
    "class of the decoder": own_class(lambda decoder: decoder),
    "forward of the class of MLPs, wrapped": wrapped("forward", lambda decoder: decoder.layers[-1].mlp),
    "forward of the class of norms, wrapped": wrapped("forward", lambda decoder: decoder.norm),
    "call of the class of layers, wrapped": wrapped("__call__", lambda decoder: decoder.layers[-1]),
    "activation": own_activation,
    "function as activation": function_as_activation,
    "weights of a type of their own": weights_of_their_own_type,
    "list of layers": own_list_of_layers,
    "last layer in another one": last_layer_in_another,
    "hooks on what is saved": saved_tensors_are_looked_at,
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_may_look_at_the_last_layer_finds_all_tokens(reader):
    model, batch = apply(make(), logits="labelled"), packed_batch()
    assert is_narrowed(model, batch)
    with READERS[reader](model):
        assert not is_narrowed(model, batch)


def share(path):
    def prepare(model):
        of, _, name = path.rpartition(".")
        for layer in model.model.layers:
            setattr(layer.get_submodule(of), name, model.model.layers[0].get_submodule(path))
        return model

    return prepare


@pytest.mark.versions
@pytest.mark.parametrize("path", ["mlp", "self_attn", "self_attn.o_proj"])
def test_what_layers_share_runs_on_all_tokens_in_the_others(path):
    batch, shared = packed_batch(), share(path)
    expected = training_step(apply(shared(make())), batch)
    assert_same_step(training_step(apply(shared(make()), logits="labelled"), batch), expected)
    assert is_narrowed(apply(shared(make()), logits="labelled"), batch)


def test_a_hook_that_calls_parts_of_the_last_layer_gets_all_tokens():
    model = apply(make(), logits="labelled")
    last, given, found = model.model.layers[-1], [], []
    parts = (last.self_attn.o_proj, last.mlp)

    def look(module, args, kwargs):
        given.append(args[0] if args else kwargs["hidden_states"])
        found.append([part(given[-1]) for part in parts])

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    training_step(model, packed_batch())
    for part, result in zip(parts, found[-1]):
        torch.testing.assert_close(result, part(given[-1]))


def test_a_hook_that_calls_the_model_again_with_gradients_is_an_error():
    """Whose answer would have no other rows in the last layer. Without gradients, it is whole."""
    model, batch = apply(make(), logits="labelled").train(), packed_batch()
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    whole, found = model(**without_labels).logits, []

    def again(module, args):
        handle.remove()
        found.append(model(**without_labels).logits)

    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *args: torch.no_grad()(again)(*args))
    model(**batch)
    torch.testing.assert_close(found[0], whole)
    handle = model.model.embed_tokens.register_forward_pre_hook(again)
    with pytest.raises(PadfreeError, match=re.escape("LlamaDecoderLayer, the last layer, ran twice in a forward")):
        model(**batch)
