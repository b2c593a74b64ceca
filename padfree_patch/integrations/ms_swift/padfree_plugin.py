"""A file for `swift sft --external_plugins`, which imports it in every process before it makes a model."""

import padfree_patch

padfree_patch.autopatch()
