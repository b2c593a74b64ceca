"""The errors this library raises on purpose."""


class PadfreeError(ValueError):
    """Something was refused before anything changed; the message says who, what was found and what to do."""


class LeakError(PadfreeError):
    """`apply` checked its own work, found that examples still mix, and has put the model back as it was."""
