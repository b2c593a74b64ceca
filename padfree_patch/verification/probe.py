"""The probes: a packed row of two random examples, run in the ways that would show a leak."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from ..models import pretrained_modules
from ..seams.model_call import needs_rows
from ..seams.rotary import as_new
from .first_leak import first_leak

LENGTHS = (9, 8)
"""Tokens of examples A and B."""

TOLERANCE_EPS = 170
"""Packed against alone, relative to the largest logit, in units of the dtype's eps: 2e-5 in float32. Packed and alone
differ by the order of additions (other matmul shapes), a few eps per layer; a leak moves logits by 1e-2 and more."""


class Probe:
    """Two random examples A and B, and another A of the same length, as embeddings (1, tokens, D).

    The embeddings require gradients, as in training. Without gradients, on some CPUs, bitsandbytes' 4-bit layers take a
    path for inference that rounds to bfloat16 and rewrites the weights, so that they can't be trained any more.
    """

    def __init__(self, model: nn.Module):
        outermost = pretrained_modules(model)[0]
        self.model = cast(nn.Module, outermost.base_model) if needs_rows(outermost) else model
        embed = cast(Callable[[], nn.Embedding], outermost.get_input_embeddings)()
        vocabulary, device = embed.weight.shape[0], embed.weight.device
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(vocabulary, (1, n), generator=generator).to(device) for n in (*LENGTHS, LENGTHS[0])]
        self.a, self.b, self.other_a = (embed(each).detach().requires_grad_() for each in ids)
        self.positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0).to(device)
        self.autocast: AbstractContextManager[object] = nullcontext()
        self.autocast = self._autocast_if_needed(device.type)

    def _autocast_if_needed(self, device_type: str) -> AbstractContextManager[object]:
        """Chooses autocast for norms in float32 beside weights in bfloat16: trained, and so run, under it."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        if len(dtypes) > 1:
            try:
                self.alone(self.b)
            except RuntimeError:
                return torch.autocast(device_type, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        return nullcontext()

    def logits(self, embeds: Tensor, **options: Tensor) -> Tensor:
        """Runs the model; gives its logits, or a decoder's hidden states."""
        # With rotaries as new: if they kept the longest sequence so far, it would decide how the others are rotated.
        with as_new(self.model), self.autocast:
            output = self.model(inputs_embeds=embeds, **options)
        if isinstance(output, tuple):
            first: Tensor = output[0]
            return first
        # By name: a mixture of experts that gives its router's loss gives it before the logits.
        named: Tensor = output["logits"] if "logits" in output else next(iter(output.values()))
        return named

    def alone(self, embeds: Tensor) -> Tensor:
        """Runs one example as in a padded batch: with a mask, without which Falcon's ALiBi on sdpa sees later tokens.

        Falcon is like that from 4.36 to 4.39.
        """
        return self.logits(embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device))

    def packed(self, a: Tensor) -> Tensor:
        """Runs an A and B in one row."""
        return self.logits(torch.cat([a, self.b], dim=1), position_ids=self.positions)

    def logit_change(self) -> float:
        """Measures how far B's logits move when A changes."""
        before, after = self.packed(self.a), self.packed(self.other_a)
        return largest((before - after)[:, LENGTHS[0] :])

    def leaked_gradient(self) -> float:
        """Measures the gradient of B's loss at A's embeddings."""
        a = self.a.detach().clone().requires_grad_()
        loss = self.packed(a)[:, LENGTHS[0] :].float().square().sum()
        (gradient,) = torch.autograd.grad(loss, a, allow_unused=True)
        return 0.0 if gradient is None else largest(gradient)

    def alone_error(self) -> tuple[float, float]:
        """Measures the relative difference between packed and alone; gives it, and what it may be."""
        # Old versions cast the logits up, and a prepared model may enter autocast itself: the coarsest dtype that any
        # linear layer gives sets the bound.
        dtypes: set[torch.dtype] = set()
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    hook = module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
                    stack.callback(hook.remove)
            alone = torch.cat([self.alone(each) for each in (self.a, self.b)], dim=1)
        packed = self.packed(self.a)
        error = largest(packed.float() - alone.float()) / max(largest(alone), torch.finfo(torch.float32).tiny)
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes | {alone.dtype})
        return error, min(TOLERANCE_EPS * coarsest, 0.1)

    def first_leak(self) -> str | None:
        """Names the first module that carries something from A to B."""
        return first_leak(self.model, self.packed, self.a, self.other_a, LENGTHS[1])


def largest(values: Tensor) -> float:
    """Gives the largest magnitude; NaN stays NaN, which is never 0."""
    return values.detach().float().abs().max().item()
