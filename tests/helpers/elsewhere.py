"""Tensors that say that they lie on a device, for what a CPU can tell of it."""

from __future__ import annotations

import torch


class Elsewhere(torch.Tensor):
    """A tensor on the CPU of which `device` says that it lies on CUDA."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def cpu(self) -> torch.Tensor:
        return torch.Tensor.cpu(self.as_subclass(torch.Tensor))

    def to(self, place, *args, **kwargs) -> torch.Tensor:
        if place == torch.device("cuda"):
            return self
        return self.as_subclass(torch.Tensor).to(place, *args, **kwargs)


def elsewhere(tensor: torch.Tensor) -> Elsewhere:
    return tensor.clone().as_subclass(Elsewhere)
