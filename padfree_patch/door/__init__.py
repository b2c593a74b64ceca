"""The door: patches models that somebody else's code makes, in a process that asked for it.

- `command`: `padfree-patch run`, which starts a command so that every Python of it goes through the door;
- `startup/sitecustomize.py`: what such a Python runs first, until it imports transformers;
- `hooks`: `padfree_patch.autopatch`, the functions of transformers that are entered;
- `arriving`: a model that was just made is patched, or left alone with a line;
- `training`: it is verified where its training begins;
- `watch`: what the training batches of its decoder show;
- `advice`: what to switch on in the tool that runs.
"""
