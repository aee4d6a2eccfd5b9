"""What the memory of tensors says about them: the dependence that is watched is the one that autograd finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_flatness.recording.dispatch import dispatcher
from lightning_flatness.recording.memories import DependenceWatch


def written_into(a: Tensor, b: Tensor) -> Tensor:
    buffer = torch.zeros(2, 3)
    buffer[0] = a[0] * 2
    return buffer.t()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "one": lambda a, b: a.exp().sum(),
    "both": lambda a, b: {"sum": [a + b]}["sum"][0].view(6),
    "neither": lambda a, b: torch.ones(2),
    "the other": lambda a, b: (a.relu(), torch.cat([b, b]))[1],
    "in place": lambda a, b: torch.zeros(2, 3).add_(b),
    "written into a part": written_into,
    "an index": lambda a, b: a.argmax(1),
    "in steps": lambda a, b: F.one_hot(a.argmax(1), 3).float() * b,
    "a comparison": lambda a, b: torch.where(a > 0, b, 0.0),
    "complex numbers": lambda a, b: torch.complex(a, torch.zeros_like(a)).abs(),
}


def outcome(function: Callable[[Tensor, Tensor], Any], a: Tensor, b: Tensor) -> Any:
    watch = DependenceWatch(2)
    dispatcher().attach(watch)
    try:
        sources = [value.clone() for value in (a, b)]
        for number, source in enumerate(sources):
            watch.add(source, number)
        return watch, function(*sources)
    finally:
        dispatcher().detach(watch)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_floating_dependence_is_that_of_autograd(function: Callable[[Tensor, Tensor], Any]) -> None:
    a, b = torch.randn(2, 2, 3)
    watch, result = outcome(function, a, b)
    leaves = a.requires_grad_(), b.requires_grad_()
    again = function(*leaves)
    found = torch.autograd.grad(again.sum(), leaves, allow_unused=True) if again.requires_grad else (None, None)
    assert [watch.depends(result, source) for source in (0, 1)] == [gradient is not None for gradient in found]


def test_what_depends_in_steps_is_known_as_well() -> None:
    watch, result = outcome(FUNCTIONS["in steps"], *torch.randn(2, 2, 3))
    assert [watch.depends(result, source, in_steps=True) for source in (0, 1)] == [True, True]
    assert not watch.depends(torch.ones(2), 0, in_steps=True)
    assert watch.failure is None
