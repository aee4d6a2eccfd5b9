"""Watches over a cut of the learning rate: says so, once, if something that the cut has not reached overrides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_flatness.actions.learning_rate import is_known, learning_rates

_REMEDY = (
    "Let the code or the scheduler that sets it compute from "
    '`group["lr"]`, `group["initial_lr"]` or `scheduler.base_lrs`.'
)


def warn_if_lost(
    optimizer: Optimizer,
    before: Sequence[float | None],
    schedulers: Callable[[], Sequence[Any]] | None = None,
    resumed: bool = False,
) -> None:
    """Warn, once, if a cut learning rate is overridden.

    The learning rates are looked at before each step of the optimizer. A cut is lost or may be lost if

    - a scheduler drives the optimizer that was not there when the rates were cut;
    - the rates are set by code that is no scheduler of torch's: it may compute from a constant;
    - the first change by an unknown subclass of `LRScheduler` restores the old level.

    A later watch over the same optimizer takes the place of this one.

    Args:
        optimizer: the optimizer; its learning rates have just been cut.
        before: the learning rates before the cut.
        schedulers: returns the schedulers that drive the optimizer at present; None: they are not known, and only a
            first change that restores the old level is reported.
        resumed: whether the cut was made before a checkpoint from which the training goes on.
    """
    earlier = _WATCHES[optimizer]() if optimizer in _WATCHES else None
    if earlier is not None:
        earlier.is_over = True
    watch = _Watch(optimizer, before, schedulers, resumed)
    optimizer.register_step_pre_hook(watch.look)
    _WATCHES[optimizer] = ref(watch)  # the optimizer's hook keeps it


def schedulers_of(trainer: Trainer, optimizer: Optimizer) -> list[Any]:
    """Return the schedulers of an optimizer that the Trainer steps at present."""
    configured = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [each for each in configured if getattr(each, "optimizer", None) is optimizer]


class _Watch:
    def __init__(
        self,
        optimizer: Optimizer,
        before: Sequence[float | None],
        schedulers: Callable[[], Sequence[Any]] | None,
        resumed: bool,
    ) -> None:
        self.is_over = False  # a hook cannot remove itself: torch is iterating over them
        self._before, self._after = list(before), learning_rates(optimizer)
        self._schedulers, self._resumed = schedulers, resumed
        self._reached = list(schedulers()) if schedulers else []  # by the cut
        self._unjudged = [each for each in self._reached if isinstance(each, LRScheduler) and not is_known(each)]
        self._last, self._marks = self._after, _marks(optimizer)

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Compare the learning rates with those of the last step."""
        if self.is_over:
            return
        drivers = self._schedulers() if self._schedulers else ()
        new = [each for each in drivers if not any(each is one for one in self._reached)]
        if new:
            self._warn(f"{type(new[0]).__name__} has taken over since. It computes from values that were not cut.")
        elif (marks := _marks(optimizer)) != self._marks:
            self._marks = marks
            now = learning_rates(optimizer)[: len(self._after)]
            if now != self._last:
                self._last = now
                self._judge(now, drivers)

    def _judge(self, now: list[float | None], drivers: Sequence[Any]) -> None:
        restored = [
            (old, cut, new)
            for old, cut, new in zip(self._before, self._after, now, strict=False)
            if old is not None and cut is not None and new is not None and cut < old and new > math.sqrt(old * cut)
        ]
        setter = next((each for each in drivers if _has_set(each, now)), None)
        if setter is not None and setter not in self._unjudged:
            return  # a scheduler of torch's, all of which was cut
        if restored:
            old, cut, new = restored[0]
            self._warn(f"{self._cut(old, cut)}, it was set to {new:.4g} in the next change.")
        elif setter is not None:
            self._unjudged.remove(setter)
        elif self._schedulers is None:
            self.is_over = True
        else:
            shown = " and ".join(dict.fromkeys(f"{new:.4g}" for new in now if new is not None))
            self._warn(
                f"it was then set to {shown}, not by a scheduler of torch's. Unless computed from the cut rate, "
                "this is what it would have been without the cut."
            )

    def _cut(self, old: float, new: float) -> str:
        return f"cut to {new:.4g} before the resume" if self._resumed else f"cut from {old:.4g} to {new:.4g}"

    def _warn(self, what: str) -> None:
        self.is_over = True
        rank_zero_warn(
            f"A cut of the learning rate must reach whatever computes it: {what} {_REMEDY}", category=UserWarning
        )


_WATCHES: WeakKeyDictionary[Optimizer, ref[_Watch]] = WeakKeyDictionary()


def _marks(optimizer: Optimizer) -> list[Any]:
    """Return what differs after a change of a learning rate; reading a tensor would wait for its device."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [(id(rate), rate._version) if isinstance(rate, Tensor) else rate for rate in rates]


def _has_set(scheduler: Any, rates: Sequence[float | None]) -> bool:
    """Return whether a scheduler's last learning rates are these."""
    last = getattr(scheduler, "_last_lr", None)  # what `get_last_lr` returns; private in torch 2.13
    return last is not None and [None if rate is None else float(rate) for rate in last][: len(rates)] == list(rates)
