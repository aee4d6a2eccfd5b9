"""What is raised, the verdict that a network cannot be measured, and checks of arguments."""

from __future__ import annotations

from dataclasses import dataclass


class UnsupportedTailError(ValueError):
    """What follows the monitored convolution has no closed form, so no exact number can be reported."""


class NonFiniteError(ValueError):
    """A value that must be finite is not, so there is nothing to measure."""


class GraphError(RuntimeError):
    """Recorded operations cannot be repeated faithfully."""


@dataclass(frozen=True)
class Refusal:
    """The verdict that a network cannot be measured exactly.

    Functions that judge a network return it as a value. It is raised once, where the measurement was asked for.

    Attributes:
        message: what must hold, what was found, what to do.
        cause: the exception that led to the verdict, if there is one.

    Example:
        >>> raise Refusal("The network must end in a linear layer; it ends in `relu`.").error()
        Traceback (most recent call last):
        ...
        lightning_flatness.errors.UnsupportedTailError: The network must end in a linear layer; it ends in `relu`.
    """

    message: str
    cause: Exception | None = None

    def error(self) -> UnsupportedTailError:
        """Return the exception to raise."""
        error = UnsupportedTailError(self.message)
        error.__cause__ = self.cause
        return error


def require_counts(**counts: object) -> None:
    """Refuse arguments that are not a whole number, at least 1.

    Raises:
        ValueError: names the argument.
    """
    for argument, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{argument}` must be a whole number, at least 1; got {value!r}.")
