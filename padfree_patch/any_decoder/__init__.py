"""Decoders that no patch is registered for: the places to enter are found in the live model, and `verify` decides.

Every decoder hands its layers a mask, in every version. The stand-in for that mask (`noted_mask`) carries the batch,
and whoever receives it answers:

- `builders`: upstream's mask builders give back a stand-in that knows how to make one sequence's mask;
- `interface`: attention functions (4.48 on) go to a varlen backend if they are plain; those with `sinks` are plain
  where the backend knows sinks. Special ones (softcaps, position biases) run upstream's own function on each sequence;
- `mixers`: any other module that is handed the mask (state-space models, convolutions, linear attention, attention past
  the interface), and modules that `verify` names, run their own forward on each sequence;
- `models`: the forwards that a caller calls.

`way` lists what to try: kernels where attention is plain, then every attention per sequence, then every layer. What
`verify` names is added. `padfree_patch.patching.found` does the trying.
"""
