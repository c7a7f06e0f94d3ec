"""The one exception for wrong input, and the check of numbers that raises it."""

import math
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


def check_range(least: float | int, most: float | int = math.inf, **values: float | int) -> None:
    """Refuses numbers outside of a range.

    Args:
        least: The smallest number that will do.
        most: The largest one.
        **values: The numbers by name.

    Raises:
        InputError: If one of them is outside, or NaN.

    Example:
        >>> check_range(0, 1, discount=1.5)
        Traceback (most recent call last):
        ...
        celo2_harness.lab.errors.InputError: discount = 1.5: expected a number from 0 to 1
    """
    for name, value in values.items():
        if not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
            raise InputError(f"{name} = {value}: expected {expected}")
