"""The demo: the same fine-tuning run padded and padding-free, side by side.

`padfree-patch demo` or `python -m padfree_patch.demo`. Needs click, rich, matplotlib and accelerate; importing this
package imports none of them.
"""
