"""How exact the values are in each precision of the Trainer; the bounds are those of docs/reference/robustness.md."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning_runs import trainer
from networks import Net, conv2d, residual
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.confidence import DOUBTS, FORMS, errors
from lightning_flatness import FlatnessMonitor, ForwardRecorder, PooledMethod
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.data.passes import measured_batches, preserved_state
from lightning_flatness.metrics.evaluation import Evaluation

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Net(conv2d(32, inputs=16), head=nn.Linear(32, 10)),
    "residual": lambda: Net(conv2d(32, inputs=32), tail=residual, head=nn.Linear(32, 10)),
    "silu": lambda: Net(conv2d(32, inputs=16), nn.SiLU(inplace=True), head=nn.Linear(32, 10)),
}


class Bounds(NamedTuple):
    """Largest deviations: of a value relative to it, of a margin relative to the spread of the margins."""

    arithmetic: float  # from float64 arithmetic on the same recorded tensors
    model: float  # from a float64 model of the same weights on the same images


BOUNDS = {
    "64-true": Bounds(1e-12, 1e-10),
    "32-true": Bounds(5e-5, 1e-4),
    "channels_last": Bounds(5e-5, 1e-4),
    "16-mixed": Bounds(5e-5, 0.1),
    "bf16-mixed": Bounds(5e-5, 0.1),
    "16-true": Bounds(5e-5, 0.05),
    "bf16-true": Bounds(5e-5, 0.05),
}
OF_ORDER_ONE = {"margin/skewness", "flatness/margin_correlation", "margin/negative"}


class Classifier(LightningModule):
    def __init__(self, build: Callable[[], nn.Module], spread: float, x: Tensor, layout: torch.memory_format) -> None:
        super().__init__()
        self.net = build()
        with torch.no_grad():
            scale = spread / self.net(x).std()
            self.net.head.weight.mul_(scale), self.net.head.bias.mul_(scale)
        self.net.to(memory_format=layout)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=self.layout))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.001)


class Twofold(Evaluation):
    """Also adds up what float64 arithmetic makes of the same tensors."""

    exact: Evaluation
    in_float64: SampleQuantities  # of the last batch

    def __init__(self, device: torch.device, method: str, *options: Any) -> None:
        super().__init__(device, method, *options)
        Twofold.exact = Scaled(device, method)

    @staticmethod
    def quantities(derivatives: PooledDerivatives, *options: Any) -> SampleQuantities:
        Twofold.in_float64 = sample_quantities(derivatives.to(torch.float64), *options)
        return sample_quantities(derivatives, *options)

    def update(self, quantities: SampleQuantities) -> None:
        super().update(quantities)
        self.exact.update(Twofold.in_float64)


class Scaled(Evaluation):
    """Also says how large what is added up is: the trace of a curved tail is a sum of both signs."""

    traces = 0.0

    def update(self, quantities: SampleQuantities) -> None:
        super().update(quantities)
        self.traces += float(quantities.hessian_trace.abs().sum())

    def deviation(self, values: Mapping[str, Tensor]) -> float:
        """The largest one of `values` from those of this evaluation."""
        exact = self.compute()

        def scale(key: str) -> float:
            if key in OF_ORDER_ONE:
                return 1.0
            if key == "flatness/trace":
                return self.traces / self.samples
            return float(exact["margin/std"] if key.startswith("margin") else exact[key])

        return max(abs(float(values[key]) - float(exact[key])) / scale(key) for key in exact)


def of_float64(module: Classifier, loader: DataLoader) -> Scaled:
    """What a float64 model of the same weights gives on the same images."""
    model, evaluation = copy.deepcopy(module).double(), Scaled(torch.device("cpu"), "pooled")
    batches = [(x.double(), y) for x, y in loader]
    with preserved_state(model):
        for quantities in measured_batches(ForwardRecorder(model), PooledMethod(), model, batches):
            evaluation.update(quantities)
    return evaluation


def deviations(folder: Any, precision: str, build: Callable[[], nn.Module], spread: float) -> Bounds:
    """Measure a network whose logits have this standard deviation."""
    channels_last = precision == "channels_last"
    x, y = torch.randn(96, 2, 7, 7), torch.randint(10, (96,))
    data = DataLoader(TensorDataset(x.double() if precision == "64-true" else x, y), batch_size=32)
    module = Classifier(build, spread, x, torch.channels_last if channels_last else torch.contiguous_format)
    run = trainer(folder, FlatnessMonitor(strict=True), precision="32-true" if channels_last else precision)
    run.fit(module, data, data)
    exact, model = Twofold.exact, of_float64(module, data)
    return Bounds(exact.deviation(run.callback_metrics), model.deviation(run.callback_metrics))


@pytest.mark.filterwarnings("ignore:.*precision.*:UserWarning")
@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("precision", BOUNDS)
def test_bounds(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, precision: str, build: Callable[[], nn.Module], spread: float
) -> None:
    monkeypatch.setattr("lightning_flatness.metrics.layers.Evaluation", Twofold)
    monkeypatch.setattr("lightning_flatness.curvature.pooled.method.sample_quantities", Twofold.quantities)
    found, bounds = deviations(tmp_path, precision, build, spread), BOUNDS[precision]
    assert found.arithmetic < bounds.arithmetic
    assert found.model < bounds.model


def test_the_page_states_these_bounds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "robustness.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.e-]+) \|[^|]*\| ([\d.e-]+) \|", page, re.MULTILINE)
    assert {name: Bounds(float(first), float(second)) for name, first, second in rows} == BOUNDS


@pytest.mark.parametrize("name", FORMS)
def test_no_digits_are_lost_where_a_prediction_is_sure(name: str) -> None:
    """In float32, at doubts of 1e-4, 1e-8 and 1e-12, against 60 digits; the page has more networks."""
    form = FORMS[name]
    for doubt in DOUBTS:
        for seed in range(2):
            assert max(errors(form, doubt, seed)) < 1e-4 + (0 if form.is_proved else 1e-15 / doubt)
    assert f"| {name} |" in (Path(__file__).parents[1] / "docs" / "reference" / "robustness.md").read_text("utf-8")
