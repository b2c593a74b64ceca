"""Stands in for the scans of Mamba 2 in mamba_ssm."""

from recurrences import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]
