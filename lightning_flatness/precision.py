"""Floating-point precision: half precision is upcast, products are exact, and results are compared up to rounding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""The dtypes in half precision."""


def is_low_precision(tensor: Tensor) -> bool:
    """Return whether the tensor is in half precision."""
    return tensor.dtype in LOW_PRECISION


def upcast(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in half precision, else the tensor itself."""
    return tensor.float() if is_low_precision(tensor) else tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run matrix products in the precision of their operands: no autocast, no TF32, no autograd graph."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _EXACT_PRODUCTS:
        yield


class _ExactProducts:
    """Switches TF32 and the like off while somebody needs exact products.

    The switch belongs to the whole process, and several threads may need it at a time: the first one to come switches,
    and the last one to go restores what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._restore = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._switch()
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore.close()

    def _switch(self) -> None:
        # The older switch of all backends raises where a user has set one of the newer ones, which are by backend.
        parts: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        newer = [part for part in parts if hasattr(part, "fp32_precision")]
        with ExitStack() as undo:  # an error on the way undoes what has been done
            for part in newer:
                undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"
            if not newer:
                undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("highest")
            self._restore = undo.pop_all()


_EXACT_PRODUCTS = _ExactProducts()


def allclose_for_dtype(computed: Tensor, observed: Tensor) -> bool:
    """Return whether two results agree up to the rounding of the observed one's arithmetic.

    The bound of a column is 0.05 of its largest finite number in half precision, 1e-9 in float64, 1e-3 in float32, 1e-2
    in float32 on a CUDA device, which may multiply in TF32; and `4 eps` of the largest one of all columns.

    Args:
        computed: the result as it should be, samples first.
        observed: the result as it is; numbers that are not finite are left out.
    """
    if is_low_precision(observed):
        tolerance = 0.05
    elif observed.dtype == torch.float64:
        tolerance = 1e-9
    else:
        tolerance = 1e-2 if observed.is_cuda else 1e-3
    finite = observed.isfinite()
    size = observed.where(finite, 0.0).abs()
    if not size.numel():
        return True
    bound = tolerance * size.amax(0, keepdim=True) + 4 * torch.finfo(observed.dtype).eps * size.max()
    return bool((((computed.to(observed.dtype) - observed).abs() <= bound) | ~finite).all())


def allclose_at_scale(computed: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Return whether two results agree up to rounding; see `is_close_at_scale`, whose answer is waited for."""
    return bool(is_close_at_scale(computed, expected, scale))


def is_close_at_scale(computed: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Return whether two results agree up to rounding, at least that of numbers as large as `scale`, a scalar.

    The bound of each number is `1e4 eps` of its expected value plus `1e2 eps` of `scale`, or of the largest one if that
    is larger and the scale a scalar.

    Args:
        computed: the result.
        expected: the result as it should be.
        scale: a magnitude, a scalar; or one for each number, such as that of its map, of a shape that broadcasts.
    """
    eps = torch.finfo(expected.dtype).eps
    bound = expected.abs()
    largest = torch.maximum(bound.max(), scale) if scale.dim() == 0 else scale
    bound.mul_(1e4 * eps).add_(1e2 * eps * largest)
    return ((computed - expected).abs() <= bound).all()


def answers(*questions: Tensor | bool) -> list[bool]:
    """Return the answers to several questions; those that a device knows are waited for at once.

    Args:
        questions: truth values, or tensors that hold one.
    """
    asked = [question for question in questions if isinstance(question, Tensor)]
    told = iter(torch.stack(asked).tolist() if asked else ())
    return [bool(next(told)) if isinstance(question, Tensor) else question for question in questions]
