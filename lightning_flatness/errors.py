"""What is raised, the verdict that a network cannot be measured, checks of arguments, and missing packages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class UnsupportedTailError(ValueError):
    """What follows the monitored convolution has no closed form, so no exact number can be reported."""


class NonFiniteError(ValueError):
    """A value that must be finite is not, so there is nothing to measure."""


class GraphError(RuntimeError):
    """Recorded operations cannot be repeated faithfully."""


class UnrepeatableError(GraphError):
    """A pass is not what its record says: it draws random numbers, or something that nobody recorded took part in it.

    No other method is tried then: that the pass cannot be repeated is no property of one layer.
    """


@dataclass(frozen=True)
class Refusal:
    """The verdict that a network cannot be measured exactly.

    Functions that judge a network return it as a value. `error()` turns it into an exception, which
    `ForwardRecorder.take_pass` and `PooledMethod` raise.

    Attributes:
        message: one text that says what must hold, what was found and what to do.
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

    Args:
        counts: the values by the name of the argument. True and False are not counts.

    Raises:
        ValueError: if one is not a count; names the argument.

    Example:
        >>> require_counts(max_samples=100)
    """
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{argument}` must be a whole number, at least 1; got {value!r}. Pass such a number, or leave "
                f"`{argument}` out."
            )


def require_optional_counts(**counts: object) -> None:
    """Refuse arguments that are neither None nor a whole number, at least 1; see `require_counts`."""
    require_counts(**{argument: value for argument, value in counts.items() if value is not None})


# Module to import -> its distribution, and the extra of this package that installs it.
_OPTIONAL = {
    "matplotlib": ("matplotlib", "plots"),
    "scipy": ("scipy", "spectrum"),
    "sklearn": ("scikit-learn", "examples"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}


def missing_package(user: str, module: str) -> ModuleNotFoundError:
    """Return the error to raise where an optional package is not installed; it says how to install it.

    Args:
        user: the part that needs the package, as the subject of the sentence.
        module: the module that cannot be imported, one of `matplotlib`, `scipy`, `sklearn`, `tensorboard` and `wandb`.

    Example:
        >>> print(missing_package("A figure", "matplotlib"))
        A figure needs matplotlib, which must be installed; got no module `matplotlib`. Run `pip install matplotlib`,
        or `pip install '.[plots]'` in a clone of lightning-flatness.
    """
    distribution, extra = _OPTIONAL[module]
    return ModuleNotFoundError(
        f"{user} needs {distribution}, which must be installed; got no module `{module}`. "
        f"Run `pip install {distribution}`, or `pip install '.[{extra}]'` in a clone of lightning-flatness.",
        name=module,
    )


def require_numbers(logits: Tensor) -> None:
    """Refuse logits that are NaN.

    Raises:
        NonFiniteError: says in how many samples.
    """
    if broken := int(logits.isnan().any(1).sum()):
        raise NonFiniteError(
            f"A measurement needs numbers; got logits that are NaN in {broken} of {len(logits)} samples. "
            "Look for an overflow in the network."
        )
