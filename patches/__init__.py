"""One module per architecture; each is also an entry point of the group `padfree_patch.patches` (pyproject.toml)."""
