"""The errors that this library raises on purpose."""


class PadfreeError(ValueError):
    """Something was refused before anything changed; the message says who, what was found and what to do."""


class LeakError(PadfreeError):
    """The examples of a packed row mix, or give something else than each gives alone; `verify` has measured it."""
