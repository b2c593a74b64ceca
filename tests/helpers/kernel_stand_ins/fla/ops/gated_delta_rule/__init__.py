"""Stands in for the gated delta rule of flash-linear-attention."""

from recurrences import chunk_gated_delta_rule

__all__ = ["chunk_gated_delta_rule"]
