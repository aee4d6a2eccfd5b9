from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch.optim import AdamW, Optimizer, swa_utils
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from lightning_flatness.actions.learning_rate import cut_learning_rate, is_known, learning_rates

STEPS, FACTOR, FLOOR = 24, 0.5, 4e-3
TRIGGERS = [(step,) for step in range(STEPS - 1)] + [(3, 9), (0, 5, 13), (7, 8)]
Maker = Callable[[Optimizer], LRScheduler]


def warm_cosine(step: int) -> float:
    return step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 20))


def warm_then(make: Maker) -> Maker:
    return lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), make(o)], milestones=[6])


SCHEDULERS: dict[str, Maker | None] = {
    "none": None,
    "step": lambda o: StepLR(o, 6, gamma=0.3),
    "multistep": lambda o: MultiStepLR(o, [5, 12], gamma=0.2),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "multiplicative": lambda o: MultiplicativeLR(o, lambda step: 0.95),
    "constant": lambda o: ConstantLR(o, 0.3, total_iters=8),
    "linear": lambda o: LinearLR(o, 0.2, total_iters=9),
    "polynomial": lambda o: PolynomialLR(o, total_iters=20, power=2.0),
    "lambda": lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "lambda warm": lambda o: LambdaLR(o, warm_cosine),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=10),
    "cosine floor": lambda o: CosineAnnealingLR(o, T_max=10, eta_min=FLOOR),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=7),
    "restarts floor": lambda o: CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=FLOOR),
    "warm, exponential": warm_then(lambda o: ExponentialLR(o, 0.9)),
    "warm, cosine": warm_then(lambda o: CosineAnnealingLR(o, T_max=12)),
    "warm, cosine floor": warm_then(lambda o: CosineAnnealingLR(o, T_max=12, eta_min=FLOOR)),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, 0.3, total_iters=8), ExponentialLR(o, 0.9)]),
    "chained, then step": lambda o: SequentialLR(
        o, [ChainedScheduler([LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)]), StepLR(o, 4, 0.5)], [8]
    ),
    "warm, cosine; chained": lambda o: ChainedScheduler([SCHEDULERS["warm, cosine"](o), ExponentialLR(o, 0.99)]),
    "cyclic": lambda o: CyclicLR(o, base_lr=[0.01, 0.02], max_lr=[0.1, 0.2], step_size_up=4),
    "cyclic, shrinking": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=4, mode="triangular2"),
    "cyclic, exponential": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=4, mode="exp_range", gamma=0.95),
    "one cycle": lambda o: OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=30),
    "one cycle, three phases": lambda o: OneCycleLR(o, 0.1, 30, three_phase=True, anneal_strategy="linear"),
    "swa": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=10),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.3, patience=1, eps=1e-4),
    "plateau shared floor": lambda o: ReduceLROnPlateau(o, factor=0.3, patience=1, min_lr=FLOOR),
    "plateau floor": lambda o: ReduceLROnPlateau(o, factor=0.3, patience=1, min_lr=[FLOOR, 2 * FLOOR]),
}
WITH_FLOOR = [name for name in SCHEDULERS if name.endswith("floor")]
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


class Run:
    """A schedule of two parameter groups, step by step, without a training."""

    def __init__(self, make: Maker | None, scale: float = 1.0, tensor: bool = False) -> None:
        rates = [torch.tensor(r * scale, dtype=torch.float64) if tensor else r * scale for r in (0.1, 0.02)]
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
        self.optimizer = AdamW(groups, betas=(0.9, 0.99))
        self.schedulers = [make(self.optimizer)] if make else []

    def step(self) -> None:
        self.optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))

    def rates(self, cuts: Sequence[int] = (), **kwargs: float | bool) -> Iterator[list[float]]:
        """Yield the learning rates after 0, 1, 2, ... steps, with cuts after those of `cuts`."""
        for step in range(STEPS):
            if step:
                self.step()
            if step in cuts:
                cut_learning_rate(self.optimizer, self.schedulers, FACTOR, **kwargs)
                assert all(each.get_last_lr() == learning_rates(self.optimizer) for each in self.schedulers)
            yield learning_rates(self.optimizer)

    def reloaded(self, make: Maker | None) -> Run:
        """Resume in fresh objects, made as if nothing had been cut."""
        file = io.BytesIO()
        torch.save([self.optimizer.state_dict(), *[each.state_dict() for each in self.schedulers]], file)
        file.seek(0)
        optimizer, *schedulers = torch.load(file, weights_only=True)
        run = Run(make)
        run.optimizer.load_state_dict(optimizer)
        for scheduler, state in zip(run.schedulers, schedulers, strict=True):
            scheduler.load_state_dict(state)
        return run


def scaled(rates: list[list[float]], cuts: Sequence[int]) -> list[list[float]]:
    """The untouched schedule times the factor of each cut made so far."""
    return [[rate * FACTOR ** sum(cut <= step for cut in cuts) for rate in row] for step, row in enumerate(rates)]


def assert_close(got: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-15,
    )


def test_the_table_has_every_scheduler_of_torch() -> None:
    used = {type(scheduler) for make in SCHEDULERS.values() for scheduler in Run(make).schedulers}
    torchs = {getattr(torch_schedulers, name) for name in torch_schedulers.__all__} - {LRScheduler}
    assert torchs | {swa_utils.SWALR} == used
    assert all(is_known(scheduler) for make in SCHEDULERS.values() for scheduler in Run(make).schedulers)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@each_scheduler
def test_later_learning_rates_are_the_untouched_ones_times_the_factor(name: str, tensor: bool) -> None:
    make = SCHEDULERS[name]
    untouched = list(Run(make).rates())
    for cuts in TRIGGERS:
        run = Run(make, tensor=tensor)
        objects = [group["lr"] for group in run.optimizer.param_groups]
        assert_close(list(run.rates(cuts)), scaled(untouched, cuts))
        assert not tensor or all(a["lr"] is b for a, b in zip(run.optimizer.param_groups, objects, strict=True))


@each_scheduler
def test_a_cut_survives_a_resume(name: str) -> None:
    make = SCHEDULERS[name]
    for cut in range(STEPS - 1):
        expected = scaled(list(Run(make).rates()), [cut])[cut:]
        run = Run(make)
        for step, _ in enumerate(run.rates([cut])):
            if step == cut:
                break
        run = run.reloaded(make)
        got = [learning_rates(run.optimizer)]
        for _ in range(cut + 1, STEPS):
            run.step()
            got.append(learning_rates(run.optimizer))
        assert_close(got, expected)


@pytest.mark.parametrize("name", WITH_FLOOR)
def test_floors_kept(name: str) -> None:
    """From the cut on the run is the one that started at the factor times the learning rate, with the same floors."""
    untouched, lower = list(Run(SCHEDULERS[name]).rates()), list(Run(SCHEDULERS[name], scale=FACTOR).rates())
    for cut in range(STEPS - 1):
        got = list(Run(SCHEDULERS[name]).rates([cut], scale_floors=False))
        assert_close(got, untouched[:cut] + lower[cut:])
    repeated = list(Run(SCHEDULERS[name]).rates([8, 10, 12, 14], scale_floors=False))
    assert min(min(row) for row in repeated[8:]) >= FLOOR * (1 - 1e-12)


@each_scheduler
def test_floors_are_all_that_keeping_floors_keeps(name: str) -> None:
    if name not in WITH_FLOOR:
        for cuts in TRIGGERS[::5]:
            run, kept = Run(SCHEDULERS[name]), Run(SCHEDULERS[name])
            assert_close(list(kept.rates(cuts, scale_floors=False)), list(run.rates(cuts)))


@each_scheduler
def test_no_cut_goes_below_min_lr(name: str) -> None:
    """Each group goes on with its own factor: the one that ended at `min_lr`."""
    make, min_lr = SCHEDULERS[name], 0.015
    untouched = list(Run(make).rates())
    for cut in range(STEPS - 1):
        before, got = untouched[cut], list(Run(make).rates([cut], min_lr=min_lr))
        factors = [max(FACTOR, min(1.0, min_lr / max(rate, 1e-12))) for rate in before]
        for new, old in zip(got[cut], before, strict=True):
            assert min(old, min_lr) * (1 - 1e-9) <= new <= old
        if name not in [*WITH_FLOOR, "plateau"]:  # theirs are limits that the groups share
            assert_close(got[cut:], [[r * f for r, f in zip(row, factors, strict=True)] for row in untouched[cut:]])


@pytest.mark.parametrize("name", ["step", "exponential", "plateau floor", "none"])
def test_groups_added_during_the_run(name: str) -> None:
    run = Run(SCHEDULERS[name])
    run.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.4})
    cut_learning_rate(run.optimizer, run.schedulers, FACTOR)
    assert learning_rates(run.optimizer) == pytest.approx([0.05, 0.01, 0.2])


def test_a_group_added_later_has_the_floor_of_the_others() -> None:
    run = Run(SCHEDULERS["plateau shared floor"])
    cut_learning_rate(run.optimizer, run.schedulers, FACTOR)
    run.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.4})
    for _ in range(STEPS):
        run.step()
    assert learning_rates(run.optimizer) == pytest.approx([FACTOR * FLOOR] * 3)


def test_two_schedulers_of_one_optimizer() -> None:
    run, cut = Run(SCHEDULERS["lambda"]), Run(SCHEDULERS["lambda"])
    for each in (run, cut):
        each.schedulers.append(SCHEDULERS["plateau"](each.optimizer))
    assert_close(list(cut.rates([7])), scaled(list(run.rates()), [7]))


def test_a_group_without_a_rate_is_left_alone() -> None:
    """As Adafactor's, which finds its own step size."""
    run = Run(SCHEDULERS["cosine floor"])
    run.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.4})
    run.optimizer.param_groups[1]["lr"] = None
    for scale_floors in (True, False):
        cut_learning_rate(run.optimizer, run.schedulers, FACTOR, scale_floors=scale_floors)
    first, second, third = learning_rates(run.optimizer)
    assert (first is not None, second, third) == (True, None, pytest.approx(0.1))
    plateau = Run(SCHEDULERS["plateau floor"])
    plateau.optimizer.param_groups[1]["lr"] = None
    cut_learning_rate(plateau.optimizer, plateau.schedulers, FACTOR)
    assert learning_rates(plateau.optimizer) == [pytest.approx(0.05), None]


def test_a_tensor_that_groups_share_is_cut_once() -> None:
    """As in `AdamW(groups, lr=torch.tensor(0.1))`."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    optimizer = AdamW(groups, lr=torch.tensor(0.1, dtype=torch.float64))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    cut_learning_rate(optimizer, [], FACTOR)
    assert learning_rates(optimizer) == pytest.approx([0.05, 0.05])
