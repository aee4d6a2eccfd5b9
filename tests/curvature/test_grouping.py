"""Batches that are evaluated together have the values that each one has on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED
from torch import Tensor, nn

from lightning_flatness import SampleQuantities
from lightning_flatness.curvature import grouping
from lightning_flatness.curvature.grouping import BatchGroups
from lightning_flatness.curvature.methods import method_for

CASES = {case.name: case for case in SUPPORTED}
X, Y = CASES["relu"].data()
SIZES = 5, 5, 3, 5, 5  # of the batches, of samples that are drawn anew
Change = Callable[[nn.Module, int], None]


def binary(phi: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(phi, F.one_hot(y, 3).to(phi))


def focal(phi: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


def smaller(model: nn.Module, number: int) -> None:
    """Change the convolution's weight after the second batch."""
    if number == 2:
        model.conv.weight.data.mul_(0.5)


def swapped(model: nn.Module, number: int) -> None:
    """Run every other batch with other weights, and put the first ones back, as an average of weights is swapped."""
    for module in (model.conv, model.head):
        module.weight.data.mul_(1 if number == 0 else 4.0 if number % 2 else 0.25)


def weaker(model: nn.Module, number: int) -> None:
    """Change the classifier's weight after the second batch."""
    if number == 2:
        model.head.weight.data.mul_(0.5)


def asleep(model: nn.Module, number: int) -> None:
    """Let every unit rest in the first two batches, so that some wake in the third."""
    model.conv.bias.data.fill_(-1e3 if number < 2 else 0.1)


# Network, loss, method, memory for temporary tensors, what happens to the network; and how many samples come together.
GROUPS: dict[str, tuple[str, Any, str, int | None, Change | None, list[int]]] = {
    "cross-entropy": ("relu", F.cross_entropy, "pooled", None, None, [23]),
    "smoothing": ("relu", partial(F.cross_entropy, label_smoothing=0.1), "pooled", None, None, [23]),
    "binary": ("relu", binary, "pooled", None, None, [23]),
    "a curved activation": ("silu", F.cross_entropy, "pooled", None, None, [23]),
    "the classifier": ("relu", F.cross_entropy, "classifier", None, None, [23]),
    "the classifier, binary": ("relu", binary, "classifier", None, None, [23]),
    "the first choice is made alone": ("relu", F.cross_entropy, "auto", None, None, [5, 18]),
    "another loss": ("relu", focal, "pooled", None, None, [5, 5, 3, 5, 5]),
    "other weights": ("relu", F.cross_entropy, "pooled", None, smaller, [10, 13]),
    "other weights before the classifier": ("relu", F.cross_entropy, "classifier", None, smaller, [23]),
    "weights that are swapped": ("relu", F.cross_entropy, "pooled", None, swapped, [5, 5, 3, 5, 5]),
    "the classifier's are swapped": ("relu", F.cross_entropy, "classifier", None, swapped, [5, 5, 3, 5, 5]),
    "another classifier": ("relu", F.cross_entropy, "pooled", None, weaker, [10, 13]),
    "little memory": ("relu", F.cross_entropy, "pooled", 22 * 1100, None, [18, 5]),
    "no memory": ("relu", F.cross_entropy, "pooled", 1, None, [5, 5, 3, 5, 5]),
    "units that wake": ("relu", F.cross_entropy, "pooled", None, asleep, [10, 3, 5, 5]),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *X.shape[1:], generator=generator).to(X), Y[:n]) for n in SIZES]


def joined(parts: list[SampleQuantities]) -> dict[str, Tensor]:
    """The values of all samples, one after the other; a value of a whole batch is that of each of its samples."""
    found = {
        field.name: [(getattr(part, field.name), len(part)) for part in parts] for field in fields(SampleQuantities)
    }
    return {
        name: torch.cat([value if value.dim() else value.expand(count) for value, count in values])
        for name, values in found.items()
        if isinstance(values[0][0], Tensor)
    }


@pytest.mark.parametrize("name", GROUPS)
def test_the_values_are_those_of_each_batch(name: str) -> None:
    case, loss, method_name, chunk_bytes, change, sizes = GROUPS[name]
    model, groups = CASES[case].model().eval(), BatchGroups()
    recorder, method = method_for(model, method_name, chunk_bytes=chunk_bytes)
    together, alone = [], []
    with recorder, torch.no_grad():
        for number, (x, y) in enumerate(batches()):
            if change:
                change(model, number)
            recorder.clear()
            recorded = recorder.take_pass(loss(model(x), y))
            together += groups.add(method, recorded)
            assert groups.samples == sum(SIZES[: number + 1])
            alone.append(method_for(model, method_name)[1].quantities(recorded))
    together += groups.rest()
    assert groups.rest() == []
    assert [len(part) for part in together] == sizes
    found, expected = joined(together), joined(alone)
    assert found.keys() == expected.keys() > {"hessian_trace", "relative_flatness"}
    for key, values in found.items():
        torch.testing.assert_close(values, expected[key], rtol=1e-10, atol=1e-12, msg=key)


def test_of_many_small_batches_a_few_come_together() -> None:
    model, groups = CASES["relu"].model().eval(), BatchGroups()
    recorder, method = method_for(model, "pooled")
    with recorder, torch.no_grad():
        found = [groups.add(method, recorder.take_pass(F.cross_entropy(model(X[:1]), Y[:1]))) for _ in range(20)]
    assert [len(part) for parts in (*found, groups.rest()) for part in parts] == [8, 8, 4]


def test_a_batch_without_samples_reserves_no_memory() -> None:
    model, groups = CASES["relu"].model().eval(), BatchGroups()
    recorder, method = method_for(model, "pooled")
    ignored = torch.full_like(Y, -100)
    with recorder, torch.no_grad():
        for y in (Y, torch.cat([ignored[:1], Y[1:]])):
            recorded = recorder.take_pass(F.cross_entropy(model(X), y))
            found = groups.add(method, recorded, slice(1))
    assert [len(part) for part in (*found, *groups.rest())] == [1, 0]
    assert groups.samples == 1


def test_without_memory_for_a_group_a_batch_is_evaluated_alone() -> None:
    model, groups = CASES["relu"].model().eval(), BatchGroups()
    recorder, method = method_for(model, "pooled")
    with recorder, torch.no_grad():
        recorded = recorder.take_pass(F.cross_entropy(model(X), Y))
    with mock.patch.object(grouping, "_Group", side_effect=torch.OutOfMemoryError):
        (found,) = groups.add(method, recorded)
    assert len(found) == len(Y)
    assert groups.rest() == []


def test_samples_that_are_not_wanted_are_left_out() -> None:
    model, groups = CASES["relu"].model().eval(), BatchGroups()
    recorder, method = method_for(model, "pooled")
    with recorder, torch.no_grad():
        for x, y in batches()[:2]:
            recorded = recorder.take_pass(F.cross_entropy(model(x), y))
            assert groups.add(method, recorded, slice(2)) == []
    (found,) = groups.rest()
    assert len(found) == groups.samples == 4


@pytest.mark.parametrize("method_name", ["pooled", "classifier"])
def test_a_network_may_use_its_memory_again(method_name: str) -> None:
    """As one that fills the same tensors in every pass: larger ones are on the record without a copy."""
    torch.manual_seed(0)
    memory = {"map": torch.empty(64, 4, 9, 9), "features": torch.empty(64, 400)}

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.wide, self.head = nn.Conv2d(4, 400, 3), nn.Linear(400, 400), nn.Linear(400, 3)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.conv(memory["map"].copy_(x)).relu().mean((2, 3))
            return self.head(memory["features"].copy_(pooled) if method_name == "classifier" else pooled)

    model, groups = Kept().eval(), BatchGroups()
    recorder, method = method_for(model, method_name, chunk_bytes=2**26)
    alone = []
    with recorder, torch.no_grad():
        for _ in range(2):
            recorded = recorder.take_pass(F.cross_entropy(model(torch.randn(64, 4, 9, 9)), torch.randint(3, (64,))))
            assert groups.add(method, recorded) == []
            alone.append(method_for(model, method_name)[1].quantities(recorded).hessian_trace)
    for tensor in memory.values():
        tensor.fill_(float("nan"))
    (found,) = groups.rest()
    torch.testing.assert_close(found.hessian_trace, torch.cat(alone), rtol=1e-4, atol=0)
