"""The one exception for wrong input."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Raised when something that the user gave cannot be used; the message is one line that says what to do.

    The `celo2` command prints the message without a traceback and exits with status 2.
    """


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns the error of a wrong argument or of a missing package into an `InputError` with the same message.

    Example:
        >>> with input_errors():
        ...     raise TypeError("steps = 'many': expected a number")
        Traceback (most recent call last):
        ...
        celo2_harness.lab.errors.InputError: steps = 'many': expected a number
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error
