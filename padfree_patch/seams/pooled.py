"""A head that gives one result per row (a classifier, a reward model) gives one for each sequence of a packed row.

The decoder runs once, on the packed row. Then upstream's own head runs on what came out for each sequence, with a
stand-in for the decoder that hands it over. So which token is pooled is upstream's choice, as for one example alone:
the last one in some versions, the one before the first that equals `pad_token_id` in others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..data.unpacking import unpack
from ..errors import PadfreeError
from ..upstream import Outputs
from ..wrapping.call import Call, takes_keyword

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_OF_THE_HEAD = ("labels", "return_dict", "logits_to_keep")
"""Arguments of a head that its decoder is not given."""


def pools(head: nn.Module) -> bool:
    """Whether a head makes one result of each row, from what its decoder gives for the row's tokens."""
    if "ForSequenceClassification" not in type(head).__name__:
        return False
    decoder = getattr(head, "base_model", None)
    return any(each is decoder for each in head.children())


def pool(call: Call, batch: PackedBatch) -> object:
    """Answers the call of a head that pools: logits (sequences, labels), and the loss of labels for each sequence.

    Raises PadfreeError if there are not as many labels as sequences.
    """
    head, arguments = call.module, call.arguments
    decoder = cast(nn.Module, head.base_model)
    names = [name for name in arguments if name not in (call.names[0], *_OF_THE_HEAD)]
    given = {name: arguments[name] for name in names if takes_keyword(type(decoder).forward, name)}
    if takes_keyword(type(decoder).forward, "return_dict"):
        given["return_dict"] = True
    outputs = decoder(**given)
    logits = torch.cat(_logits_of_each(call, batch, decoder, outputs))
    loss = _loss(head, logits, arguments.get("labels"))
    return _result(call, loss, logits)


@torch.compiler.disable
def _logits_of_each(call: Call, batch: PackedBatch, decoder: nn.Module, outputs: Outputs) -> list[Tensor]:
    """Runs upstream's head on each sequence; returns logits (1, labels) each."""
    name = "input_ids" if call.arguments.get("input_ids") is not None else "inputs_embeds"
    both = (each.flatten(0, 1) for each in (outputs[0], call.arguments[name]))
    examples = list(zip(*(unpack(each, batch.sequences, with_prompts=True) for each in both)))
    found = []
    for some_hidden, some_tokens in examples[:-1] if batch.sequences.padding else examples:
        alone = call.changed()
        alone.arguments = {call.names[0]: call.module, name: some_tokens[None]}
        with _handed_over(call.module, decoder, _like(outputs, some_hidden[None])):
            result = alone.proceed()
        found.append(result["logits"] if isinstance(result, dict) else result[0])
    return found


def _like(outputs: Outputs, hidden: Tensor) -> Outputs:
    """Returns what the decoder gave, of other hidden states and nothing else: an output with names, or a tuple."""
    return type(outputs)(last_hidden_state=hidden) if isinstance(outputs, dict) else (hidden,)


class _HandsOver(nn.Module):
    """Stands in the decoder's place, and returns what the decoder gave before."""

    def __init__(self, outputs: Outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: object, **kwargs: object) -> Outputs:
        return self.outputs


@contextmanager
def _handed_over(head: nn.Module, decoder: nn.Module, outputs: Outputs) -> Iterator[None]:
    """Puts a stand-in into the decoder's place for a moment."""
    (name,) = (name for name, child in head.named_children() if child is decoder)
    head._modules[name] = _HandsOver(outputs)
    try:
        yield
    finally:
        head._modules[name] = decoder


def _loss(head: PreTrainedModel, logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Computes upstream's loss of labels (sequences,) or (sequences, labels)."""
    if labels is None:
        return None
    if labels.shape[:1] != logits.shape[:1]:
        raise PadfreeError(
            f"{type(head).__name__}: labels of shape {tuple(labels.shape)} for a packed batch of {len(logits)} "
            "sequences; it needs a label for each. padfree_patch.DataCollatorForSequenceClassification makes them. "
            "TRL's RewardTrainer wants its own collator, and padfree_patch.integrations.padded.pack_padded(model)"
        )
    labels = labels.to(logits.device)
    if hasattr(head, "loss_function"):  # from 4.46 on
        return head.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=head.config)
    return _loss_before_4_46(head.config, logits, labels)


def _loss_before_4_46(config: PretrainedConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Computes what modeling_llama.py of 4.36 to 4.45 has at the end of LlamaForSequenceClassification.forward."""
    if config.problem_type is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        several = "single_label_classification" if whole else "multi_label_classification"
        config.problem_type = "regression" if config.num_labels == 1 else several
    if config.problem_type == "regression":
        return F.mse_loss(*((logits.squeeze(), labels.squeeze()) if config.num_labels == 1 else (logits, labels)))
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def _result(call: Call, loss: Tensor | None, logits: Tensor) -> Outputs:
    """Returns what upstream's head returns: an output with names, or a tuple if the caller or config asks for it."""
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    named = call.arguments.get("return_dict")
    if named is None:
        named = getattr(call.module.config, "return_dict", True)
    if named:
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits)
    return (logits,) if loss is None else (loss, logits)
