"""Random tails, heads, losses and malformed input: the right number or a clear error, never anything else.

The examples are the same every day; `make fuzz` draws 20,000 others.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fuzz_heads import COUPLED, SUMS, tasks
from fuzz_inputs import AROUND, GOOD, Batches, batches
from fuzz_tails import positions, tails
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from recorded import brute_force
from torch import Tensor, nn

from lightning_flatness import NonFiniteError, UnsupportedTailError, measure, oracle

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # random tails in all
fuzz = settings(
    max_examples=-(-(EXAMPLES or 510) // 3),
    derandomize=not EXAMPLES,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
FLAT = ("derivatives are all zero", "no derivative reaches")  # refusals that are right where the Hessian is zero
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def in_batches(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def assert_right(
    samples: dict[str, Tensor],
    model: nn.Module,
    layer: str,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    least: float = 1e-16,
) -> None:
    """Both numbers against the full Hessian; errors are relative to what is summed up to them.

    Where a prediction is sure, the oracle itself is not exact: autograd takes differences of probabilities, which
    leaves it with the rounding of the squared gradients of the logits.
    """
    model, rounding = copy.deepcopy(model).double(), ROUNDING[x.dtype]
    target = y.double() if y.is_floating_point() else y.long()

    def terms(criterion: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        hessian = oracle.layer_hessian(model, layer, x.double(), target, criterion)
        weight = model.get_submodule(layer).weight.detach().flatten(1)
        return {
            "hessian_trace": torch.einsum("nkiki->nki", hessian),
            "relative_flatness": torch.einsum("nkili->nkl", hessian) * (weight @ weight.T),
        }

    squared_gradients: dict[str, Tensor] = {}
    for name, expected in terms(loss).items():
        error = (samples[name] - expected.sum((1, 2))).abs()
        allowed = rounding * expected.abs().sum((1, 2)) + least
        if not (error <= allowed).all():
            squared_gradients = squared_gradients or terms(lambda z, _: (z - z.detach()).square().sum() / 2)
            allowed = allowed + 1e-14 * squared_gradients[name].abs().sum((1, 2))
        assert (error <= allowed).all(), (name, samples[name], expected.sum((1, 2)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@fuzz
@given(data=st.data())
def test_random_tails(dims: int, data: st.DataObject) -> None:
    tail = data.draw(tails(dims))
    model, (x, y) = tail.model(), tail.data()
    is_named = tail.named or tail.wiring == "mask"  # through which the skip acts in steps alone
    layer = "conv" if is_named or positions(model, x) == 1 else None
    criterion = tail.criterion(x.dtype)
    # The oracle takes each sample alone; the classifier's own weight would be measured as it is in the batch.
    method = "pooled" if tail.wiring == "across the batch" else "auto"
    batches = in_batches(x, y, tail.batch_sizes)
    try:
        report = measure(model, batches, layer=layer, method=method, loss=criterion, per_sample=True)
    except UnsupportedTailError as error:
        is_flat = any(reason in str(error) for reason in FLAT) and any(
            not bool(oracle.hessian_trace(model.eval(), "conv", *batch, criterion).any()) for batch in batches
        )
        if tail.plain and not is_flat:
            raise
        event("refused")
    else:
        event("measured")
        # A single number divided by its own norm does not move but for rounding.
        least = 1e-14 if tail.pool == "norm of the vector" else 1e-16
        assert_right(report.samples, model, report.layer, x, y, tail.criterion(torch.float64), least)


@pytest.mark.parametrize("dims", [1, 2, 3])
@fuzz
@given(data=st.data())
def test_random_heads_and_losses(dims: int, data: st.DataObject) -> None:
    """Two batches are the mean of each, by the samples that count; each is the Hessian of what the step computes."""
    task = data.draw(tasks(dims))
    model, batches = task.model(), task.batches()

    def measured(*chosen: tuple[Tensor, Tensor]) -> Any:
        return measure(copy.deepcopy(model), chosen, layer="conv", loss=task.criterion, per_sample=True)

    try:
        reports = [measured(batch) for batch in batches]
        both = measured(*batches)
    except UnsupportedTailError as error:
        is_flat = any(reason in str(error) for reason in FLAT) and any(
            not any(map(bool, brute_force(model.eval(), "conv", lambda m, x, y: task.criterion(m(x), y), *batch)))
            for batch in batches
        )
        if task.plain and not is_flat:
            raise
        kind = "samples coupled" if task.loss in COUPLED else "a tail without a closed form"
        event(f"refused, {kind}: {str(error).splitlines()[0][:60]}")
        return
    except NonFiniteError:
        assert task.head == "cosine"  # which has no derivative where all features are zero
        event("refused, no derivative")
        return
    except ValueError:
        assert task.loss == "contrastive"  # which is constant for a batch of one
        event("refused, no sample counts")
        return
    event("measured")
    counts = [report.n_samples for report in reports]
    assert counts == [task.counted(y) for _, y in batches]
    assert both.n_samples == sum(counts)
    for name in ("hessian_trace", "relative_flatness"):
        means = [getattr(report, name) for report in reports]
        terms = [count * mean for count, mean in zip(counts, means, strict=True)]
        scale = float(both.samples[name].abs().mean())
        assert getattr(both, name) == pytest.approx(sum(terms) / sum(counts), rel=1e-9, abs=1e-9 * scale + 1e-14)
    model.eval()
    # The reference of a cosine head is a difference of terms as large as one over the square of the features.
    rounding = 1e-10 if task.head == "cosine" else 1e-12
    for (x, y), report, count in zip(batches, reports, counts, strict=True):
        expected = brute_force(model, "conv", lambda m, x, y: task.criterion(m(x), y), x, y)
        for place, name in enumerate(("hessian_trace", "relative_flatness")):
            total = float(expected[place]) / (count if task.loss in SUMS else 1)
            error, scale = abs(getattr(report, name) - total), abs(total) + float(report.samples[name].abs().mean())
            allowed = 1e-8 * scale + rounding
            if error > allowed:  # where a prediction is sure, the reference has this rounding
                squares = brute_force(model, "conv", lambda m, x, y: half_square(m(x)), x, y)[place]
                allowed += 1e-14 * float(squares)
            assert error <= allowed, (name, getattr(report, name), total)


def half_square(logits: Tensor) -> Tensor:
    """A loss whose Hessian is the sum of the squared gradients of the logits."""
    return (logits - logits.detach()).square().sum() / 2


def fails_by_itself(model: nn.Module, batch: Any) -> bool:
    """Whether the network raises for a batch's inputs without being measured."""
    try:
        model.eval()(batch["image"] if isinstance(batch, dict) else batch[0])
    except Exception:
        return True
    return False


@fuzz
@given(case=batches())
def test_malformed_input(case: Batches) -> None:
    """A `ValueError`, the network's own error, or the numbers of all the samples."""
    model = case.model()
    try:
        report = measure(model, AROUND[case.around](case.nested()), per_sample=True)
    except ValueError as error:
        if case.good:
            raise
        event(type(error).__name__)
        return
    except Exception:
        alone = case.around == "first batch"  # its inputs are taken for a batch
        batch = case.nested()[0][0] if alone else case.nested()[case.place]
        if not (alone or case.around in GOOD["around"]) or not fails_by_itself(model, batch):
            raise
        event("the network's own error")
        return
    event("measured")
    if (case.nesting, case.around) == ("twice nested", "first batch"):
        return  # they make up for each other: a list of one good batch
    assert case.nesting in GOOD["nesting"]
    assert case.around in GOOD["around"]
    inputs, targets = zip(*((x, y) for x, y in case.parts() if len(x)), strict=True)
    assert report.n_samples == sum(map(len, inputs))
    at = 0
    for x, y in zip(inputs, targets, strict=True):
        assert len(y) == len(x)
        samples = {name: values[at : at + len(x)] for name, values in report.samples.items()}
        assert_right(samples, model, report.layer, x.detach(), y)
        at += len(x)
