"""Stands in for causal_conv1d."""

from recurrences import causal_conv1d_fn

__all__ = ["causal_conv1d_fn"]
