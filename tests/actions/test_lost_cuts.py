from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import SWALR

from lightning_flatness.actions.learning_rate import cut_learning_rate, is_known, learning_rates
from lightning_flatness.actions.lost_cuts import warn_if_lost

FACTOR = 0.5


@contextmanager
def said() -> Iterator[list[str]]:
    """What is said about cuts meanwhile."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(each.message) for each in caught if "cut of the learning rate" in str(each.message)]


class FromItsOwn(LRScheduler):
    """Computes from values that no convention names."""

    def get_lr(self) -> list[float]:
        return [0.1 * 0.99**self.last_epoch for _ in self.optimizer.param_groups]


class FromTheBase(LRScheduler):
    def get_lr(self) -> list[float]:
        return [base * 0.99**self.last_epoch for base in self.base_lrs]


@pytest.mark.parametrize(("kind", "lost"), [(FromItsOwn, True), (FromTheBase, False), (None, True)])
def test_a_lost_cut_is_one_warning(kind: type[LRScheduler] | None, lost: bool) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedulers = [kind(optimizer)] if kind else []
    assert not any(is_known(scheduler) for scheduler in schedulers)
    before = learning_rates(optimizer)
    cut_learning_rate(optimizer, schedulers, FACTOR)
    warn_if_lost(optimizer, before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            if not kind:
                optimizer.param_groups[0]["lr"] = 0.1
    assert ["cut from 0.1 to 0.05" in str(each.message) for each in caught] == [True] * lost


def set_to(*rates: float) -> Callable[[int, dict[str, Any]], None]:
    """By hand, at the fourth step and the next ones."""

    def change(step: int, group: dict[str, Any]) -> None:
        if 0 <= step - 3 < len(rates):
            group["lr"] = rates[step - 3]

    return change


class Foreign:
    """A scheduler that is no `LRScheduler`; it computes from a constant."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** (self.steps // 3)


# What drives the learning rate, what is done by hand after a step, what is said after a cut from 0.1 to 0.05.
NOTHING, BY_HAND, BACK = None, "not by a scheduler of torch's", "cut from 0.1 to 0.05, it was set to"
AFTER: dict[str, tuple[Any, Callable[[int, dict[str, Any]], None] | None, str | None]] = {
    "nothing": (None, None, NOTHING),
    "torch's": (lambda o: StepLR(o, 2, 0.1), None, NOTHING),
    "torch's, rising": (lambda o: LambdaLR(o, lambda step: 1.5**step), None, NOTHING),
    "a plateau": (lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0), None, NOTHING),
    "back by hand": (None, set_to(0.1), BACK),
    "lower by hand": (None, set_to(0.02), BY_HAND),
    "the same by hand, then lower": (
        None,
        lambda step, group: (set_to(0.05, 1), set_to(0.01, 4))[step > 2](step, group),
        BY_HAND,
    ),
    "by hand beside torch's": (lambda o: StepLR(o, 2, 0.1), set_to(0.02), BY_HAND),
    "back by hand beside torch's": (lambda o: StepLR(o, 2, 0.1), set_to(0.1), BACK),
    "another make": (Foreign, None, BACK),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("make", "by_hand", "expected"), AFTER.values(), ids=AFTER)
def test_each_lost_cut_is_one_warning(make: Any, by_hand: Any, expected: str | None, tensor: bool) -> None:
    rate = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedulers = [make(optimizer)] if make else []
    cut_learning_rate(optimizer, schedulers, FACTOR)
    warn_if_lost(optimizer, [0.1], lambda: schedulers)
    with said() as texts:
        for step in range(8):
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
            if by_hand:
                by_hand(step, optimizer.param_groups[0])
    assert len(texts) == (expected is not None)
    assert not expected or expected in texts[0]


def test_a_scheduler_that_takes_over_is_a_warning() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedulers: list[Any] = [StepLR(optimizer, 2, 0.1)]
    cut_learning_rate(optimizer, schedulers, FACTOR)
    warn_if_lost(optimizer, [0.1], lambda: schedulers)
    with said() as texts:
        for step in range(6):
            optimizer.step()
            if step == 2:
                schedulers[0] = SWALR(optimizer, swa_lr=0.05)
            schedulers[0].step()
    assert [("SWALR has taken over" in text) for text in texts] == [True]


def test_the_last_of_several_cuts_is_watched() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(2):
        before = learning_rates(optimizer)
        cut_learning_rate(optimizer, [], FACTOR)
        warn_if_lost(optimizer, before, list)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with said() as texts:
        optimizer.step()
    assert ["cut from 0.05 to 0.025" in text for text in texts] == [True]


def test_a_watch_goes_with_its_optimizer() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    warn_if_lost(optimizer, [0.2], lambda: [optimizer] * 0)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
