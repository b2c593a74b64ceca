"""The columns of packed rows that say where their examples end."""

BOUNDARIES = ("position_ids", "seq_idx", "attention_mask", "seq_lengths")
"""A Trainer keeps those that the model's forward names: most name `position_ids`; PEFT's wrapper, which old Trainers
ask, only `attention_mask`; a patched model that names neither `seq_idx`; TRL keeps `seq_lengths`. The collators read
any of them."""
