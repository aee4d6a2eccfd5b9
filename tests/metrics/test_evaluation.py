"""All keys of an evaluation: documented, exact in any number of processes, and not fooled by confidence."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from metrics.checks import CASES, derivatives, split, value_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness.metrics
from lightning_flatness import FlatnessMonitor, measure
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule
from lightning_flatness.keys import CHURN
from lightning_flatness.metrics.evaluation import Evaluation

CPU = torch.device("cpu")
METRICS = [getattr(lightning_flatness.metrics, name) for name in lightning_flatness.metrics.__all__]
PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
FACTORS = ("confidence", "head", "kernel", "features", "alignment")


def evaluated(*batches: PooledDerivatives) -> dict[str, Tensor]:
    evaluation = Evaluation(CPU)
    for batch in batches:
        evaluation.update(sample_quantities(batch))
    return evaluation.compute()


def assert_same(values: Any, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(values, expected, rtol=rtol, atol=1e-14)


class Recorder(L.Callback):
    """What was logged in each validation."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logged = trainer.callback_metrics.items()
        self.history.append({k: float(v) for k, v in logged if k.startswith(("flatness/", "margin/"))})


def quiet_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def real_run() -> list[dict[str, float]]:
    recorder = Recorder()
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=10, callbacks=[FlatnessMonitor(strict=True), recorder])
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule())
    return recorder.history


def test_the_page_lists_what_is_logged(real_run: list[dict[str, float]]) -> None:
    rows = [re.split(r" \| ", line.strip("| ")) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    documented = [row for row in rows if re.fullmatch(r"`(flatness|margin)/\w+`", row[0])]
    assert all(len(row) == 6 and all(row) for row in documented)
    keys = {row[0].strip("`") for row in documented}
    compared = [False, False, True, True]  # predictions: not in the sanity check and the first validation
    assert [set(logged) for logged in real_run] == [keys if known else keys - {CHURN} for known in compared]
    assert set(evaluated(derivatives())) == set(real_run[0])


def test_factors_multiply_in_every_validation_of_a_real_run(real_run: list[dict[str, float]]) -> None:
    assert len(real_run) == 4  # the sanity check and three epochs
    for logged in real_run:
        assert all(map(math.isfinite, logged.values()))
        product = math.prod(logged[f"flatness/{name}"] for name in FACTORS)
        assert product == pytest.approx(logged["flatness/relative"], rel=1e-6)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_splits_do_not_matter(name: str) -> None:
    expected = evaluated(derivatives(name))
    for sizes in ([1] * 5, [2, 0, 3], [4, 1]):
        assert_same(evaluated(*split(derivatives(name), sizes)), expected)


def run_on_rank(rank: int, folder: Path, sizes: list[int]) -> None:
    """Measure this process's share and save what it gets to see."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = split(derivatives("silu"), sizes)[rank]
    batches = split(share, [1, len(share) - 1]) if len(share) else []
    torch.save([evaluated(*batches), *(value_of(metric(), *batches) for metric in METRICS)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [[3, 2], [5, 0]], ids=str)
def test_two_processes_equal_one(tmp_path: Path, sizes: list[int]) -> None:
    whole = derivatives("silu")
    expected = [evaluated(whole), *(value_of(metric(), whole) for metric in METRICS)]
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=run_on_rank, args=(rank, tmp_path, sizes)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


def confident_data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Samples that the model classifies correctly with a margin of 1 at least."""
    x = torch.randn(200, *CASES["relu"].input_shape[1:])
    top = model.eval()(x).topk(2)
    sure = top.values[:, 0] - top.values[:, 1] > 1
    assert sure.sum() > 50
    return x[sure], top.indices[sure, 0]


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_ten_times_larger_logits_fool_flatness_but_not_the_monitor(name: str) -> None:
    model = CASES[name].model().float()
    x, y = confident_data(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    seen, reports = [], []
    for _ in range(2):
        recorder = Recorder()
        quiet_trainer(callbacks=[FlatnessMonitor(strict=True), recorder]).validate(Module(model), loader, verbose=False)
        seen += recorder.history
        reports.append(measure(model, loader))
        with torch.no_grad():
            model.head.weight.mul_(10)
            model.head.bias.mul_(10)
    before, after = seen
    assert abs(after["flatness/relative"]) < abs(before["flatness/relative"]) / 100
    assert after["flatness/scale_free"] == pytest.approx(before["flatness/scale_free"], rel=1e-5)
    assert after["margin/mean"] == pytest.approx(10 * before["margin/mean"], rel=1e-5)
    changes = {key: abs(after[f"flatness/{key}"]) / abs(before[f"flatness/{key}"]) for key in FACTORS}
    assert min(changes, key=changes.get) == "confidence"
    assert changes["confidence"] < 1e-3
    assert changes["head"] == pytest.approx(100, rel=1e-5)
    assert (changes["kernel"], changes["features"]) == pytest.approx((1, 1))
    for logged, report in zip(seen, reports, strict=True):
        assert report.scale_free_flatness == pytest.approx(logged["flatness/scale_free"], rel=1e-9)
        assert report.margins == pytest.approx({name: logged[f"margin/{name}"] for name in report.margins})


def classifier_of(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    ).double()


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("labels", ["one class", "all wrong", "ties"])
def test_edges_have_finite_values(classes: int, samples: int, labels: str) -> None:
    model, x = classifier_of(classes), torch.randn(samples, 2, 5, 5, dtype=torch.float64)
    if labels == "ties":
        nn.init.zeros_(model[4].weight)
        nn.init.zeros_(model[4].bias)
    y = model(x).argmin(1) if labels == "all wrong" else torch.ones(samples, dtype=torch.long)
    report = measure(model, [(x, y)])
    values = [v for v in report.to_dict().values() if isinstance(v, float)] + [*report.margins.values()]
    assert all(map(math.isfinite, values))
    if labels == "ties":
        assert (report.margins["mean"], report.margins["std"], report.margins["skewness"]) == (0, 0, 0)
        assert report.relative_flatness == report.scale_free_flatness == 0
    if labels == "all wrong":
        assert report.margins["negative"] == 1


def test_masked_classes() -> None:
    """Logits of minus infinity: another class masked is no matter, the true one is an error that names the keys."""
    model, x = classifier_of(4), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    smaller = classifier_of(3)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        model[4].bias[3] = -torch.inf
        smaller[0].load_state_dict(model[0].state_dict())
        smaller[4].weight.copy_(model[4].weight[:3])
        smaller[4].bias.copy_(model[4].bias[:3])
    masked, without = measure(model, [(x, y)]), measure(smaller, [(x, y)])
    assert masked.margins == pytest.approx(without.margins)
    assert masked.scale_free_flatness == pytest.approx(without.scale_free_flatness)
    assert masked.relative_flatness == pytest.approx(without.relative_flatness)
    with pytest.raises(ValueError, match=r"must be finite.*margin/mean.*margin/min"):
        measure(model, [(x, y + 1)])
