"""The fields by which an example may say that it holds several, and the columns of packed rows among them."""

from ..batch.lengths import LENGTH_ARGUMENTS

KEPT = "label_ids"
"""A Trainer keeps a column of this name whatever the model's forward names. In packed rows it holds the tokens of each
example as negative numbers, which nobody takes for labels."""

COLUMNS_OF_PACKED_ROWS = ("position_ids", "seq_idx", "attention_mask", "seq_lengths", KEPT)
"""A Trainer keeps those that the model's forward names, and `KEPT`; TRL keeps `seq_lengths`. The collators read any."""

BOUNDARY_FIELDS = (*COLUMNS_OF_PACKED_ROWS, *LENGTH_ARGUMENTS)
"""Of these, the collators read any that says where examples end; a mask does by segment numbers."""
