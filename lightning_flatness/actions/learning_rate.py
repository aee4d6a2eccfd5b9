"""Cuts a learning rate in such a way that its scheduler continues from the cut, even after a resume."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

# What schedulers store in the parameter groups: OneCycleLR its three levels, SWALR its final one.
_GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr")


def learning_rates(optimizer: Optimizer) -> list[float | None]:
    """Return the learning rate of each parameter group; None where there is none, as Adafactor finds its own."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [None if rate is None else float(rate) for rate in rates]


def cut_learning_rate(
    optimizer: Optimizer,
    schedulers: Sequence[LRScheduler],
    factor: float,
    min_lr: float = 0.0,
    scale_floors: bool = True,
) -> None:
    r"""Multiply an optimizer's learning rates, and everything that its schedulers compute them from, by a factor.

    If \(\eta_t\) is the schedule without the cut, every later learning rate is \(f \eta_t\). A scheduler computes the
    next learning rate from the last one, from `base_lrs`, from values stored in the parameter groups or from limits of
    its own. All of these are scaled, so nothing restores the old level. They are part of the `state_dict` of the
    optimizer and the scheduler, so the cut survives a resume and must not be repeated.

    `eta_min` of the cosine schedulers and `min_lr` of `ReduceLROnPlateau` are floors. With `scale_floors=False` they
    keep their values: a cosine then runs from \(f\) times its base down to the old floor, and the later values of a
    plateau scheduler are \(\max(f \eta_t, \text{floor})\).

    A tensor learning rate is changed in place, because a captured graph reads it there. A parameter group without a
    learning rate (None) is left as it is.

    Args:
        optimizer: the optimizer, driven by any number of schedulers or none.
        schedulers: its schedulers; those inside a `SequentialLR` or `ChainedScheduler` are found.
        factor: what the learning rates are multiplied by, between 0 and 1.
        min_lr: no cut goes below it. A parameter group that would fall below it gets the larger factor that ends there;
            a group that is already at or below it keeps its schedule. Later values of the schedule are not limited.
        scale_floors: whether floors are scaled too.

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
    for group, lr, f in zip(optimizer.param_groups, before, cut.factors, strict=True):
        if lr is None:
            continue
        _set_learning_rate(group, lr * f)  # from the value before: groups may share a tensor
        group.update({key: group[key] * f for key in _GROUP_KEYS if group.get(key) is not None})
    members = [member for scheduler in schedulers for member in _members(scheduler)]
    active = {id(member) for scheduler in schedulers for member in _members(scheduler, only_active=True)}
    for scheduler in members:
        groups = optimizer.param_groups if id(scheduler) in active else []
        if isinstance(scheduler, ReduceLROnPlateau):
            _cut_plateau(scheduler, groups, cut)
        elif hasattr(scheduler, "eta_min") and hasattr(scheduler, "base_lrs"):
            _cut_cosine(scheduler, groups, cut)
        elif hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = cut.scaled(scheduler.base_lrs)
        if hasattr(scheduler, "max_lrs"):
            scheduler.max_lrs = cut.scaled(scheduler.max_lrs)
    for scheduler in members:  # what `get_last_lr` returns; private in torch 2.13
        rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
        scheduler._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]


def stand_ins(optimizer: Optimizer, schedulers: Sequence[LRScheduler]) -> tuple[Any, list[LRScheduler]]:
    """Return copies of all that a cut changes: cutting those shows what a cut would do, and does nothing else.

    Args:
        optimizer: the optimizer.
        schedulers: its schedulers; those inside others are copied too.

    Returns:
        What has the optimizer's parameter groups without their parameters, and the schedulers; they serve
        `cut_learning_rate` and `learning_rates` only.
    """
    groups = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return SimpleNamespace(param_groups=groups), [_copied(scheduler) for scheduler in schedulers]


def _copied(scheduler: LRScheduler) -> LRScheduler:
    copied = object.__new__(type(scheduler))
    vars(copied).update(vars(scheduler))
    if hasattr(scheduler, "_schedulers"):
        vars(copied)["_schedulers"] = [_copied(member) for member in scheduler._schedulers]
    return copied


def is_known(scheduler: LRScheduler) -> bool:
    """Return whether a scheduler is one of torch's own: `cut_learning_rate` scales all that those compute from."""
    return all(type(member).__module__.startswith("torch.optim.") for member in _members(scheduler))


class _Cut(NamedTuple):
    """The learning rates before the cut, the factor of each parameter group, and whether floors are scaled too."""

    before: list[float | None]
    factors: list[float]
    scale_floors: bool

    @property
    def floor_factor(self) -> float:
        """The factor of a floor that all groups share: that of the group that is cut least."""
        return max(self.factors) if self.scale_floors else 1.0

    def scaled(self, values: list[Any]) -> list[Any]:
        """Return one scaled value per group; groups may have been added since the scheduler was created."""
        return [value * f for value, f in zip(values, self.factors, strict=False)]


def _group_factor(lr: float | None, factor: float, min_lr: float) -> float:
    if lr is None:
        return 1.0
    if lr * factor >= min_lr:
        return factor
    return min_lr / lr if lr > min_lr else 1.0


def _members(scheduler: LRScheduler, only_active: bool = False) -> Iterator[LRScheduler]:
    """Yield a scheduler and those inside it: all of them, or those that set the learning rate at present."""
    yield scheduler
    inner = getattr(scheduler, "_schedulers", ())  # this and `_milestones` are private in torch 2.13
    if only_active and isinstance(scheduler, SequentialLR):
        inner = [inner[bisect_right(scheduler._milestones, scheduler.last_epoch)]]
    for each in inner:
        yield from _members(each, only_active)


def _cut_plateau(scheduler: ReduceLROnPlateau, groups: list[dict[str, Any]], cut: _Cut) -> None:
    """Scale the floors of a plateau scheduler and its smallest change; no group falls below its floor."""
    if cut.scale_floors:
        scheduler.min_lrs = cut.scaled(scheduler.min_lrs)
    if scheduler.default_min_lr is not None:
        scheduler.default_min_lr *= cut.floor_factor
    scheduler.eps *= max(cut.factors)
    for group, lr, floor in zip(groups, cut.before, scheduler.min_lrs, strict=False):
        if lr is None:
            continue
        _set_learning_rate(group, max(group["lr"], min(lr, floor)))


def _cut_cosine(scheduler: Any, groups: list[dict[str, Any]], cut: _Cut) -> None:
    """Scale both ends of a cosine. The learning rate keeps its relative position, so the curve stays a cosine."""
    old_floor, old_bases = scheduler.eta_min, scheduler.base_lrs
    floor = scheduler.eta_min = old_floor * cut.floor_factor
    bases = [max(new, min(old, floor)) for new, old in zip(cut.scaled(old_bases), old_bases, strict=False)]
    scheduler.base_lrs = bases
    for group, lr, f, base, old_base in zip(groups, cut.before, cut.factors, bases, old_bases, strict=False):
        if lr is None or (floor == old_floor * f and base == old_base * f):
            continue  # both ends were scaled like the learning rate
        if old_base == old_floor:
            _set_learning_rate(group, max(group["lr"], min(lr, floor)))
        else:
            _set_learning_rate(group, floor + (lr - old_floor) * (base - floor) / (old_base - old_floor))


def _set_learning_rate(group: dict[str, Any], value: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(value))
    else:
        group["lr"] = float(value)
