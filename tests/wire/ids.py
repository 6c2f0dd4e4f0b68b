"""What parametrized cases are called: the same in each process, whatever the values are."""


def shown(value: object) -> str:
    """A type as it is written, a text as it is; of other values their class alone."""
    if isinstance(value, str):
        return value
    written = repr(value)
    return written if written.startswith(("<class", "typing.")) else type(value).__name__
