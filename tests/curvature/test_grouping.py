"""Batches that are evaluated together have the values that each one has on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED
from torch import Tensor, nn

from lightning_flatness import SampleQuantities
from lightning_flatness.curvature.grouping import BatchGroups
from lightning_flatness.curvature.methods import method_for

CASES = {case.name: case for case in SUPPORTED}
X, Y = CASES["relu"].data()
SIZES = 5, 5, 3, 5  # of the batches, of samples that are drawn anew
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


def asleep(model: nn.Module, number: int) -> None:
    """Let every unit rest in the first two batches, so that some wake in the third."""
    model.conv.bias.data.fill_(-1e3 if number < 2 else 0.1)


# Network, loss, method, memory for temporary tensors, what happens to the network; and how many samples come together.
GROUPS: dict[str, tuple[str, Any, str, int | None, Change | None, list[int]]] = {
    "cross-entropy": ("relu", F.cross_entropy, "pooled", None, None, [18]),
    "smoothing": ("relu", partial(F.cross_entropy, label_smoothing=0.1), "pooled", None, None, [18]),
    "binary": ("relu", binary, "pooled", None, None, [18]),
    "a curved activation": ("silu", F.cross_entropy, "pooled", None, None, [18]),
    "the classifier": ("relu", F.cross_entropy, "classifier", None, None, [18]),
    "the classifier, binary": ("relu", binary, "classifier", None, None, [18]),
    "the first choice is made alone": ("relu", F.cross_entropy, "auto", None, None, [5, 13]),
    "another loss": ("relu", focal, "pooled", None, None, [5, 5, 3, 5]),
    "other weights": ("relu", F.cross_entropy, "pooled", None, smaller, [10, 8]),
    "other weights before the classifier": ("relu", F.cross_entropy, "classifier", None, smaller, [18]),
    "little memory": ("relu", F.cross_entropy, "pooled", 2**16, None, [13, 5]),
    "no memory": ("relu", F.cross_entropy, "pooled", 1, None, [5, 5, 3, 5]),
    "units that wake": ("relu", F.cross_entropy, "pooled", None, asleep, [10, 3, 5]),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *X.shape[1:], generator=generator).to(X), Y[:n]) for n in SIZES]


def joined(parts: list[SampleQuantities]) -> dict[str, Tensor]:
    """The values of all samples, one after the other."""
    found = {field.name: [getattr(part, field.name) for part in parts] for field in fields(SampleQuantities)}
    tensors = {name: values for name, values in found.items() if isinstance(values[0], Tensor) and values[0].dim()}
    return {name: torch.cat(values) for name, values in tensors.items()}


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
    expected = joined(alone)
    assert expected
    for key, values in joined(together).items():
        torch.testing.assert_close(values, expected[key], rtol=1e-10, atol=1e-12, msg=key)


def test_samples_that_are_not_wanted_are_left_out() -> None:
    model, groups = CASES["relu"].model().eval(), BatchGroups()
    recorder, method = method_for(model, "pooled")
    with recorder, torch.no_grad():
        for x, y in batches()[:2]:
            recorded = recorder.take_pass(F.cross_entropy(model(x), y))
            assert groups.add(method, recorded, slice(2)) == []
    (found,) = groups.rest()
    assert len(found) == groups.samples == 4


def test_a_network_may_use_its_memory_again() -> None:
    """As one whose outputs are buffers that every pass fills anew."""
    model, groups, memory = CASES["relu"].model().eval(), BatchGroups(), torch.empty_like(X)
    recorder, method = method_for(model, "pooled")
    expected, data = [], batches()[:2]
    with recorder, torch.no_grad():
        for x, y in data:
            memory.copy_(x)
            recorded = recorder.take_pass(F.cross_entropy(model(memory), y))
            groups.add(method, recorded)
            expected.append(method_for(model, "pooled")[1].quantities(recorded).hessian_trace)
    memory.fill_(float("nan"))
    (found,) = groups.rest()
    torch.testing.assert_close(found.hessian_trace, torch.cat(expected), rtol=1e-12, atol=0)
