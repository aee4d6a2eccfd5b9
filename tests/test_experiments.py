"""The experiments: a smoke run of each, and the parts that their tables rest on."""

from __future__ import annotations

import hashlib
import math
import pickle
import struct
import subprocess
import sys
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn

pytest.importorskip("pandas")
pytest.importorskip("ruptures")
pytest.importorskip("sklearn")

import numpy as np
import pandas as pd

from experiments import (
    ablation,
    acting,
    alerts,
    choosing,
    costs,
    detection,
    detectors,
    false_friend,
    layer_traces,
    margins,
    onset,
    ranking,
    report,
    statistics,
)
from experiments import data as experiment_data
from experiments.claims import Claim
from experiments.data import Images, split
from experiments.networks import POOLED, network
from experiments.runs import options
from experiments.training import measured
from lightning_flatness import Rule, measure

CHANGES = ("labels_30", "rate_x10", "no_augmentation", "corrupted_inputs")


HALVES = ("tuning", "held out", "further")


def check_alerts(rows: pd.DataFrame) -> pd.DataFrame:
    """A fork is the healthy run until its disturbance, and another one after it."""
    task = next(alerts.tasks(smoke=True))
    curves = {curve.kind: [row["flatness/relative"] for row in curve.values] for curve in detection.curves(rows)}
    assert set(curves) == {"healthy", "slow", "memorisation", *CHANGES}
    assert all(len(curve) == task.validations for curve in curves.values())
    assert len({curves[kind][-1] for kind in ("healthy", *CHANGES)}) == 5
    at, disturbance = task.disturbed_at, alerts.Disturbance("labels_30", task.disturbed_at, task.seed)
    again = [row["flatness/relative"] for row in alerts.curve(task, "labels_30", disturbance)]
    assert again[:at] == pytest.approx(curves["labels_30"][:at], rel=1e-4)
    assert again[-1] != pytest.approx(curves["healthy"][-1], rel=1e-4)
    each = {"monitor": [100.0], "layer traces": [200.0], "on training images": [1000.0]}
    cost = detection.spent(rows, pd.DataFrame({"nothing": [1.0], **each}))
    found = detection.table(detection.judged(rows), "tuning", cost)
    assert found.ms["EarlyStopping val_loss"] < 100 < found.ms["label_noise"] < 200
    assert 1100 < found.ms[detectors.BOTH] < 1200
    assert found.ms["Hutchinson per layer, CUSUM"] > 200
    return found


def check_choosing(rows: pd.DataFrame) -> pd.DataFrame:
    """A search of two trials leaves one of them, and each rule keeps a checkpoint."""
    kept, chosen = choosing.errors(rows)
    assert kept.shape[0] == chosen.shape[0] == 1
    assert set(chosen.iloc[0, 1:]) <= {*rows[rows.validation == 2].test_error, chosen["any (mean)"][0]}
    return choosing.table(chosen, "val_loss")


TABLES = {
    ablation: ablation.summary,
    alerts: check_alerts,
    choosing: check_choosing,
    costs: lambda rows: rows[list(costs.SOURCES)],
    ranking: lambda rows: pd.DataFrame(ranking.summary(rows)),
    margins: lambda rows: rows.dropna(subset="network_trace"),
    onset: onset.changes,
    acting: acting.gains,
}
if hasattr(callbacks, "WeightAveraging"):  # since Lightning 2.6
    TABLES[false_friend] = false_friend.fooled


@pytest.mark.parametrize("experiment", TABLES, ids=lambda module: module.NAME)
def test_smoke(experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    monkeypatch.setattr(detectors, "THRESHOLDS", (4,))
    monkeypatch.setattr(detectors, "PENALTIES", (3,))
    monkeypatch.setattr(detectors, "PATIENCES", (3,))
    monkeypatch.setattr(alerts, "CHANGES", CHANGES)
    chosen = options(None, ["--smoke", "--jobs", "1", "--output", str(tmp_path)])
    rows = experiment.record(chosen)
    tasks = list(experiment.tasks(smoke=True))
    assert rows.seconds.nunique() <= len(tasks) <= len(rows)
    assert rows.versions.str.contains("torch").all()
    assert isinstance(TABLES[experiment](rows), pd.DataFrame)
    # A second call finds all runs in the file: nothing is run again.
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run", lambda task: pytest.fail("ran again"))
        pd.testing.assert_frame_equal(experiment.record(chosen), rows)


def test_command_in_two_processes(tmp_path: Path) -> None:
    """The experiment is then `__main__` here, and imported there."""
    command = [sys.executable, "-m", "experiments.costs", "--smoke", "--jobs", "2", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=report.PAGES.parents[1])
    assert len(pd.read_csv(tmp_path / "costs.csv")) == len(list(costs.tasks(smoke=True)))


def test_full_designs() -> None:
    """No configuration comes twice, and the halves of the alerts share no seed."""
    for experiment in (*TABLES, false_friend):
        tasks = list(experiment.tasks())
        assert len(set(tasks)) == len(tasks)
        assert {task.data for task in experiment.tasks(data="cifar10")} == {"cifar10"}
    groups = list(alerts.tasks())
    halves = {
        half: {task.seed for task in groups if detection.half_of(task.data, task.seed) == half} for half in HALVES
    }
    assert not halves["tuning"] & halves["held out"]
    assert halves["further"] == set(detection.SEEN)
    assert {task.validations for task in groups} == set(alerts.LENGTHS)
    assert len(groups) * len(alerts.KINDS) >= 300
    assert len(list(ranking.tasks())) >= 150


def series(*values: float) -> detectors.Values:
    return [{"val_loss": value, "flatness/scale_free": value, "margin/churn": value} for value in values]


@pytest.mark.parametrize(
    ("detect", "curve", "first"),
    [
        (lambda v: detectors.cusum("flatness/scale_free", 20, v), [1, 1.1] * 8 + [3] * 6, 16),
        (lambda v: detectors.cusum("flatness/scale_free", 20, v), [1, 1.1] * 11, None),
        (lambda v: detectors.pelt("flatness/scale_free", 5, v), [1, 1.1] * 8 + [3] * 6, 16),
        (lambda v: detectors.early_stopping(3, v), [4, 3, 2, 2.5, 2.5, 2.5, 1], 5),
        (lambda v: detectors.early_stopping(3, v), [4, 3, 2, 2.5, 2.5, 1.9, 1], None),
        (lambda v: detectors.label_wave(2, v), [0.5, 0.4, 0.3, 0.2, 0.3, 0.4, 0.5], 6),
    ],
)
def test_detectors(detect: detectors.Detector, curve: list[float], first: int | None) -> None:
    alarms = detect(series(*curve))
    assert (alarms[0][0] if alarms else None) == first


def test_thresholds_come_from_the_tuning_half_alone() -> None:
    """They are the lowest at which a detector gives no more false alarms there than the built-in rules."""
    counts = {
        detectors.DEFAULT: {"as it is": (1, 0)},
        "one": {"2": (3, 0), "4": (1, 5), "8": (0, 5)},
        "loud": {"2": (9, 0), "4": (2, 0)},
    }
    rows = [
        {
            "detector": name,
            "threshold": threshold,
            "half": half,
            "kind": "healthy",
            "optimizer": "sgd",
            "alerts": alarms,
        }
        for name, thresholds in counts.items()
        for threshold, pair in thresholds.items()
        for half, alarms in zip(("tuning", "held out"), pair, strict=True)
    ]
    assert detection.selected(pd.DataFrame(rows)) == {detectors.DEFAULT: "as it is", "one": "4", "loud": "4"}


def test_rules_that_fire_together_are_one_event_and_the_first_names_the_cause() -> None:
    falls = Rule("flatness/features", shift_down=4.0, name="divergence")
    rises = Rule("flatness/kernel", above=0.5)
    curve = [{"flatness/features": 1.0, "flatness/kernel": 0.1, "learning_rate": 0.1}] * 10
    thrown = {"flatness/features": 0.1, "flatness/kernel": 0.2, "learning_rate": 1.0}
    after = [thrown, thrown, {**thrown, "flatness/kernel": 0.9}, {**thrown, "flatness/kernel": 0.9}]
    assert detectors.any_fired([rises, falls], curve + after) == [(11, detectors.RATE), (13, "")]
    unraised = [{**each, "learning_rate": 0.1, "flatness/scale_free": 1.0} for each in curve + after[:2]]
    assert detectors.any_fired([falls], unraised) == [(11, detectors.LABELS)]


def test_pairs_differ_in_one_hyperparameter() -> None:
    base = {"data": "digits", "seed": 0, "network": "plain", "width": 8, "depth": 1, "weight_decay": 0.0}
    base |= {"learning_rate": 0.1, "batch_size": 32, "augmentation": False, "label_noise": 0.0}
    rows = pd.DataFrame(
        [
            base | {"test_error": 0.1},
            base | {"width": 16, "test_error": 0.3},
            base | {"width": 16, "depth": 2, "test_error": 0.5},
            base | {"seed": 1, "test_error": 0.9},
            base | {"batch_size": 128, "test_error": 0.1001},  # within the noise of the first
        ]
    )
    found = ranking.pairs(rows).itertuples(index=False, name=None)
    assert set(found) == {(0, 1, "width"), (1, 2, "depth")}
    for key in (*ranking.KEYS, *ranking.RIVALS):
        rows[key] = rows.test_error if key not in ranking.HIGHER_IS_BETTER else -rows.test_error
    assert ranking.sign_errors(rows).relative.tolist() == [0, 0]
    assert ranking.sign_errors(rows.assign(relative=-rows.test_error)).relative.tolist() == [1, 1]


def test_a_key_is_recorded_under_its_own_name() -> None:
    module, data = ranking.trained(ranking.Task("digits", "plain", 4, validations=1, steps=5))
    found, keys = measured(module, data.training), ranking.keys(module, data.training)
    assert keys == {key: found[ranking.full_name(key)] for key in ranking.KEYS}
    assert keys["scale_free"] != keys["scale_free_margin"]


@pytest.mark.parametrize("name", ranking.FAMILIES)
def test_a_rescaling_changes_the_trace_and_not_the_function(name: str) -> None:
    data = split("digits", 40, 20, 0)
    torch.manual_seed(0)
    net = network(name, data.shape, data.classes, 4, 2)
    net(data.training.images)  # statistics of batch norm
    other, batches = ablation.rescaled(net, 0), [(data.training.images, data.training.labels)]
    torch.testing.assert_close(net.eval()(data.test.images), other(data.test.images), rtol=1e-3, atol=1e-4)
    before, after = (measure(each, batches, loss="cross_entropy") for each in (net, other))
    assert after.relative_flatness == pytest.approx(before.relative_flatness, rel=1e-3)
    assert abs(math.log(after.hessian_trace / before.hessian_trace)) > 0.1


def test_layer_traces_are_those_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    images = Images(torch.randn(20, 1, 2, 2), torch.arange(20) % 2)
    exact = false_friend.hessian(net, images).diagonal().split([12, 6])
    monkeypatch.setattr(layer_traces, "PROBES", 1000)
    found = layer_traces.layer_traces(net, images, torch.Generator().manual_seed(0))
    assert found == pytest.approx([float(each.sum()) for each in exact], rel=0.1)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_information_criterion_is_made_of_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    images, weights = Images(torch.randn(7, 1, 2, 2), torch.arange(7) % 3), list(net.parameters())
    losses = -net(images.images).log_softmax(1)
    gradients = [[torch.autograd.grad(each, weights, retain_graph=True) for each in row] for row in losses]
    squares = torch.tensor([[sum(float(g.square().sum()) for g in each) for each in row] for row in gradients])
    rows = torch.arange(7)
    covariance, gauss_newton = squares[rows, images.labels].mean(), (squares * (-losses).exp()).sum(1).mean()
    expected = losses[rows, images.labels].mean() + covariance / gauss_newton / 7
    assert choosing.information_criterion(net, images) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_path_norm_counts_paths() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    net[1].running_var.copy_(torch.tensor([4.0, 0.25]))
    first, scale, last = net[0].weight.flatten(), net[1].weight / (net[1].running_var + net[1].eps).sqrt(), net[4]
    paths = sum(float((last.weight[c, k] * scale[k] * first[k]).detach() ** 2) for c in range(3) for k in range(2))
    assert ranking.path_norm(net, (1, 1, 1)) == pytest.approx(
        paths + float(last.bias.detach().square().sum()), rel=1e-4
    )


def test_the_hessian_has_the_trace_of_the_package() -> None:
    data = split("digits", 40, 20, 0)
    net = network("mlp", data.shape, data.classes, 3, 1)
    batches = [(data.training.images, data.training.labels)]
    report = measure(net, batches, method="jacobian", layer="all", loss="cross_entropy")
    assert float(false_friend.hessian(net, data.training).trace()) == pytest.approx(report.network_trace, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("name", [*POOLED, "logistic", "mlp", "mlp_norm", "lenet"])
def test_networks_take_images_of_any_size(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = network(name, shape, 7, width=4, depth=2)
    images = torch.randn(6, *shape)
    assert net(images).shape == (6, 7)
    if name in POOLED and shape == (1, 8, 8):
        assert measure(net, [(images, torch.arange(6))], loss="cross_entropy").method == "pooled"


def test_parts_of_the_data_are_disjoint_and_disturbed_as_asked() -> None:
    data = split("digits", 300, 100, 0)
    sizes = [len(part) for part in (data.training, data.validation, data.test)]
    assert sizes == [300, 100, 1397]
    everything = torch.cat([part.images.flatten(1) for part in (data.training, data.validation, data.test)])
    assert len(everything.unique(dim=0)) == sum(sizes)
    assert float(data.training.images.mean()) == pytest.approx(0, abs=1e-5)
    before, again = data.training.labels.clone(), split("digits", 300, 100, 0)
    data.training.randomise_labels(0.3, seed=1)
    assert 0.2 < float((data.training.labels != before).float().mean()) <= 0.3
    assert again.training.labels.equal(before)  # the pool is not touched
    images, labels = data.training.__getitems__([4, 2])
    assert images.shape == (2, 1, 8, 8)
    assert labels.tolist() == data.training.labels[[4, 2]].tolist()
    assert isinstance(data.validation, Images)


def test_a_name_that_is_no_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="must be digits, mnist5k"):
        split("no such folder", 1, 1, 0)


def test_a_folder_of_images(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for label, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        (tmp_path / str(label)).mkdir()
        for number in range(4):
            image.new("RGB", (40, 30), colour).save(tmp_path / str(label) / f"{number}.png")
    data = split(str(tmp_path), 4, 2, 0)
    assert data.shape == (3, 32, 32)
    assert data.training.images[data.training.labels == 0][:, 0].min() > 0


def write_mnist(folder: Path) -> None:
    """Write 20 training and 20 test images of 28 x 28 in MNIST's format: big-endian sizes, then bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = np.arange(20, dtype=np.uint8) % 2
        images = np.full((20, 28, 28), 1, dtype=np.uint8) * (1 + labels[:, None, None])
        sizes = struct.pack(">IIII", 0x0803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, 20) + labels.tobytes())


def write_cifar(folder: Path, kind: Any, labels_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ten images a file in CIFAR's format: pickled rows of 1,024 red, green and blue bytes."""
    base = folder / kind.base_folder
    base.mkdir(parents=True)

    def written(name: str, content: dict[str, Any]) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    labels = np.arange(10) % 2
    data = np.repeat(np.stack([1 + labels, 0 * labels, 0 * labels], 1), 1024, 1).astype(np.uint8)
    for part in ("train_list", "test_list"):
        files = [[name, written(name, {"data": data, labels_name: labels.tolist()})] for name, _ in getattr(kind, part)]
        monkeypatch.setattr(kind, part, files)
    meta = kind.meta["filename"]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": written(meta, {kind.meta["key"]: ["a", "b"]})})


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_the_formats_of_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(experiment_data, "DOWNLOADS", tmp_path)
    if name == "mnist":
        write_mnist(tmp_path)
    else:
        kind, labels = {
            "cifar10": (datasets.CIFAR10, "labels"),
            "cifar100": (datasets.CIFAR100, "fine_labels"),
        }[name]
        write_cifar(tmp_path, kind, labels, monkeypatch)
    try:
        data = split(name, 8, 4, 0)
    finally:
        experiment_data._pool.cache_clear()
    size = {"mnist": 40, "cifar10": 60, "cifar100": 20}[name]
    assert data.shape == ((1, 28, 28) if name == "mnist" else (3, 32, 32))
    assert [len(part) for part in (data.training, data.validation, data.test)] == [8, 4, size - 12]
    # The first channel is brighter in the second class: images, channels and labels are where they belong.
    first = data.test.images[:, 0].flatten(1)
    assert first.std(1).max() == 0
    assert first[data.test.labels == 1].min() > first[data.test.labels == 0].max()


def test_verdicts_follow_from_the_interval() -> None:
    estimates = {
        "held": (0.6, 0.9),
        "undecided": (0.4, 0.9),
        "did not hold": (0.1, 0.4),
        "too few": (math.nan,) * 2,
    }
    for verdict, (low, high) in estimates.items():
        found = statistics.Estimate(0.5, low, high, 0 if verdict == "too few" else 9)
        assert Claim("page", "text", "none", found, lambda p: p > 0.5).verdict == verdict


def test_intervals_cover_what_they_should() -> None:
    assert statistics.share(9, 10)[1:3] == pytest.approx((0.5550, 0.9975), abs=1e-4)  # a table of Clopper and Pearson
    estimate = statistics.mean([1.0, 2.0, 3.0, 4.0])
    assert estimate.low <= estimate.value == 2.5 <= estimate.high
    assert math.isnan(statistics.mean([1.0]).low)


def test_intervals_over_pairs_know_that_networks_are_shared() -> None:
    # The first of six networks is ordered wrongly against all others, the others are not.
    first, second = map(np.array, zip(*combinations(range(6), 2), strict=True))
    wrong = (first == 0).astype(float)
    found, independent = statistics.over_pairs(wrong, first, second), statistics.mean(wrong)
    assert found.value == independent.value == pytest.approx(1 / 3)
    assert found.low == 0  # the first network may not be drawn at all
    assert found.high > independent.high
    assert statistics.over_pairs(np.ones(3), np.arange(3), np.arange(3, 6))[:3] == (1, 1, 1)


def test_the_expected_choice_is_the_mean_over_all_choices() -> None:
    scores, errors = np.random.default_rng(0).permutation(12).astype(float), np.random.default_rng(1).random(12)
    choices = [list(chosen) for chosen in combinations(range(12), choosing.OUT_OF)]
    slow = np.mean([errors[chosen][scores[chosen].argmin()] for chosen in choices])
    assert choosing.expected(scores, errors) == pytest.approx(slow)


def test_pruning_and_checkpoints() -> None:
    def curve(errors: list[float], **keys: list[float]) -> pd.DataFrame:
        usual = dict.fromkeys((*choosing.SIGNS, "test_error"), errors)
        accuracies = {name: [0.5, 1.0, 1.0] for name in ("training_accuracy", "val_accuracy")}
        return pd.DataFrame({**usual, **accuracies, **keys})

    # The first trial is better in the end, and looks worse to the margin when half of the trials are pruned.
    trials = [curve([0.9, 0.5, 0.1], **{"margin/mean": [0.0, 1.0, 9.0]})]
    trials.append(curve([0.9, 0.6, 0.4], **{"margin/mean": [0.0, 2.0, 3.0]}))
    found = choosing.pruned(trials)
    assert (found["the best"], found["val_loss"], found["margin/mean"]) == (0.1, 0.1, 0.4)
    # The first checkpoint is the flattest, and not accurate enough.
    kept = choosing.checkpoints(curve([0.9, 0.2, 0.3], **{"flatness/relative": [0.0, 3.0, 2.0]}))
    assert kept["training accuracy, then flatness/relative"] == kept["the last"] == 0.3
    assert kept["training loss"] == kept["the best"] == 0.2


def test_every_experiment_has_a_page_and_a_figure() -> None:
    pages = {path.stem for path in report.PAGES.glob("*.md")}
    assert pages == {"index", *report.SECTIONS}
    assert {path.stem for path in report.PAGES.glob("*.png")} == set(report.SECTIONS)
    assert all(import_module(f"experiments.{name.replace('-', '_')}") for name in report.SECTIONS)
