"""Cutting a learning rate so that its scheduler, now and after a resume, goes on from the cut."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

# What schedulers keep in the parameter groups: OneCycleLR its three levels, SWALR its last one.
_GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr")


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def cut_learning_rate(
    optimizer: Optimizer,
    schedulers: Sequence[LRScheduler],
    factor: float,
    min_lr: float = 0.0,
    scale_floors: bool = True,
) -> None:
    r"""Multiply an optimizer's learning rates, and all that its schedulers compute from, by a factor.

    With \(\eta_t\) the schedule as it would have gone on, every later learning rate is \(f \eta_t\). A scheduler
    computes the next learning rate from the last one, from `base_lrs`, from what it keeps in the parameter groups
    or from limits of its own; all of them are scaled, so nothing brings the old level back. These values are part
    of the optimizer's and the scheduler's `state_dict`, so the cut survives a resume and is not to be repeated.

    `eta_min` of the cosine schedulers and `min_lr` of `ReduceLROnPlateau` are floors. Kept, they stay what they
    are: a cosine then runs from \(f\) times its base down to the old floor, a plateau's later values are
    \(\max(f \eta_t, \text{floor})\).

    A tensor learning rate is changed in place, as captured graphs need it.

    Args:
        optimizer: The optimizer; one scheduler or many may drive it, or none.
        schedulers: Its schedulers; those inside a `SequentialLR` or `ChainedScheduler` are found.
        factor: What the learning rates are multiplied by, between 0 and 1.
        min_lr: No group is cut below it: a group that would be gets the larger factor that ends there, a group
            that is there already keeps its schedule. What a schedule does by itself later is not limited.
        scale_floors: Whether floors are scaled too.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        >>> cut_learning_rate(optimizer, [scheduler], factor=0.5)
        >>> learning_rates(optimizer), scheduler.base_lrs
        ([0.05], [0.05])
    """
    before = learning_rates(optimizer)
    cut = _Cut(before, [_group_factor(lr, factor, min_lr) for lr in before], scale_floors)
    for group, f in zip(optimizer.param_groups, cut.factors, strict=True):
        _set_learning_rate(group, group["lr"] * f)
        group.update({key: group[key] * f for key in _GROUP_KEYS if key in group})
    nested = [inner for scheduler in schedulers for inner in _nested(scheduler)]
    active = {id(inner) for scheduler in schedulers for inner in _active(scheduler)}
    for scheduler in nested:
        groups = optimizer.param_groups if id(scheduler) in active else []
        if isinstance(scheduler, ReduceLROnPlateau):
            _cut_plateau(scheduler, groups, cut)
        elif hasattr(scheduler, "eta_min") and hasattr(scheduler, "base_lrs"):
            _cut_cosine(scheduler, groups, cut)
        elif hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = cut.scaled(scheduler.base_lrs)
        if hasattr(scheduler, "max_lrs"):
            scheduler.max_lrs = cut.scaled(scheduler.max_lrs)
    for scheduler in nested:
        scheduler._last_lr = [_copy(group["lr"]) for group in optimizer.param_groups]


def warn_if_lost(optimizer: Optimizer, before: Sequence[float]) -> None:
    """Warn, once, if the first change of a cut learning rate brings the old level back.

    For learning rates that are set by a scheduler of unknown make, or by hand: what they are computed from is
    not known, so the cut may be overwritten. Looks before each optimizer step until the first change.

    Args:
        optimizer: The optimizer, its learning rates just cut.
        before: The learning rates before the cut.
    """
    after = learning_rates(optimizer)
    watching = True

    def look(optimizer: Optimizer, *_: Any) -> None:
        nonlocal watching
        if not watching or (now := learning_rates(optimizer)[: len(after)]) == after:
            return
        watching = False  # a hook cannot remove itself: torch is iterating over them
        lost = [(a, b, c) for a, b, c in zip(before, after, now, strict=False) if b < a and c > math.sqrt(a * b)]
        if lost:
            rank_zero_warn(
                "A cut of the learning rate must reach what computes it: cut from {:.4g} to {:.4g}, it was set to "
                "{:.4g} in the next change. Let the code or the scheduler that sets it start from "
                '`group["lr"]`, `group["initial_lr"]` or `scheduler.base_lrs`.'.format(*lost[0]),
                category=UserWarning,
            )

    optimizer.register_step_pre_hook(look)


def is_known(scheduler: LRScheduler) -> bool:
    """Whether all that a scheduler computes from is scaled by `cut_learning_rate`: it is one of torch's own."""
    return all(type(inner).__module__.startswith("torch.optim.") for inner in _nested(scheduler))


class _Cut(NamedTuple):
    """The learning rates before the cut, the factor of each group, and whether floors fall too."""

    before: list[float]
    factors: list[float]
    scale_floors: bool

    @property
    def floor_factor(self) -> float:
        """Factor of a floor that all groups share: no deeper than the group that is cut least."""
        return max(self.factors) if self.scale_floors else 1.0

    def scaled(self, values: list[Any]) -> list[Any]:
        """Values of each group, scaled; groups may have been added since the scheduler was made."""
        return [value * f for value, f in zip(values, self.factors, strict=False)]


def _group_factor(lr: float, factor: float, min_lr: float) -> float:
    if lr * factor >= min_lr:
        return factor
    return min_lr / lr if lr > min_lr else 1.0


def _nested(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and those inside it."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


def _active(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield a scheduler and those inside it that set the learning rate at present."""
    yield scheduler
    inner = getattr(scheduler, "_schedulers", ())
    if isinstance(scheduler, SequentialLR):
        inner = [inner[bisect_right(scheduler._milestones, scheduler.last_epoch)]]
    for each in inner:
        yield from _active(each)


def _cut_plateau(scheduler: ReduceLROnPlateau, groups: list[dict[str, Any]], cut: _Cut) -> None:
    """Scale a plateau's floors and the smallest change it makes; a group stays at or above its floor."""
    if cut.scale_floors:
        scheduler.min_lrs = cut.scaled(scheduler.min_lrs)
    if scheduler.default_min_lr is not None:
        scheduler.default_min_lr *= cut.floor_factor
    scheduler.eps *= max(cut.factors)
    for group, lr, floor in zip(groups, cut.before, scheduler.min_lrs, strict=False):
        _set_learning_rate(group, max(group["lr"], min(lr, floor)))


def _cut_cosine(scheduler: Any, groups: list[dict[str, Any]], cut: _Cut) -> None:
    """Scale a cosine's two ends; the learning rate keeps its place between them, so the curve stays a cosine."""
    old_floor, old_bases = scheduler.eta_min, scheduler.base_lrs
    floor = scheduler.eta_min = old_floor * cut.floor_factor
    bases = [max(new, min(old, floor)) for new, old in zip(cut.scaled(old_bases), old_bases, strict=False)]
    scheduler.base_lrs = bases
    for group, lr, f, base, old_base in zip(groups, cut.before, cut.factors, bases, old_bases, strict=False):
        if floor == old_floor * f and base == old_base * f:
            continue  # both ends fell alike, and the learning rate with them
        if old_base == old_floor:
            _set_learning_rate(group, max(group["lr"], min(lr, floor)))
        else:
            _set_learning_rate(group, floor + (lr - old_floor) * (base - floor) / (old_base - old_floor))


def _set_learning_rate(group: dict[str, Any], value: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(value))
    else:
        group["lr"] = float(value)


def _copy(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value
