"""The one exception for wrong input."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what, and what to do.

    The `celo2` command prints it without a traceback and exits with status 2.
    """
