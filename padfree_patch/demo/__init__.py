"""The demo: the same fine-tuning run padded and padding-free, side by side.

`padfree-patch demo` or `python -m padfree_patch.demo`. Needs the extra `demo` (accelerate, rich, matplotlib); importing
this package imports none of them.
"""
