"""What is said about each sample: against sums by hand, and whether it finds wrong labels."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_runs import Classifier, everything, images, trainer
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset

from lightning_flatness import FlatnessMonitor, SampleQuantities
from lightning_flatness.data.samples import SampleHistory
from lightning_flatness.data.sampling import local_sample_count, sample_indices
from lightning_flatness.examples.digits import DigitsClassifier, digits_split
from lightning_flatness.functional import output_margin

LOADER = object()


class Batches(list):  # can be held weakly
    pass


def quantities(*margins: float) -> SampleQuantities:
    margin = torch.tensor(margins)
    return SampleQuantities(margin, margin**2, margin / 8, output_margin=margin)


def validated(history: SampleHistory, *parts: SampleQuantities, source: Any, indices: Any = range(99)) -> None:
    history.start()
    for part in parts:
        history.add(0, part)
    history.finish(0, source, lambda: indices)


def test_areas_are_means_over_the_validations_that_can_be_compared() -> None:
    history, first, second = SampleHistory(), Batches(), Batches()
    validated(history, quantities(4.0, 1.0), quantities(-3.0), source=first, indices="abc")
    validated(history, quantities(6.0), quantities(0.0, -5.0), source=first, indices="xyz")
    assert [(each.index, each.area, each.margin) for each in history.suspicious()] == [
        ("c", -4.0, -5.0),
        ("b", 0.5, 0.0),
        ("a", 5.0, 6.0),
    ]
    assert [each.index for each in history.sharpest(2)] == ["a", "c"]
    assert [each.index for each in history.least_certain(1)] == ["a"]
    assert "3 samples in 2 validations" in str(history)
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert other.suspicious() == history.suspicious()
        assert str(other) == str(history)
    validated(history, quantities(1.0, 2.0, 3.0), source=second)  # another loader: anew
    assert [each.area for each in history.suspicious()] == [1.0, 2.0, 3.0]
    validated(history, quantities(1.0, 2.0), source=second)  # another number of samples: anew
    assert len(history.suspicious()) == 2


@pytest.mark.parametrize(
    ("parts", "source", "indices"),
    [
        ([quantities(1.0)], None, range(1)),
        ([quantities(1.0)], LOADER, None),
        ([], LOADER, range(1)),
        ([SampleQuantities(*[torch.ones(1)] * 3)], LOADER, range(1)),
    ],
    ids=["no order", "no indices", "no samples", "no margins"],
)
def test_what_is_not_known_is_absent(parts: list[SampleQuantities], source: Any, indices: Any) -> None:
    history = SampleHistory()
    validated(history, *parts, source=[source] if source else None, indices=indices)
    for choose in (history.suspicious, history.sharpest, history.least_certain):
        with pytest.raises(ValueError, match="same order in every validation; loader 0 has none"):
            choose()
    assert str(history) == "No samples: none was measured in a fixed order."


class Margins(Callback):
    """The margins of the network by hand."""

    def __init__(self, dataset: Any) -> None:
        self.images, self.labels = (torch.stack(part) for part in zip(*dataset, strict=True))
        self.seen: list[torch.Tensor] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            with torch.inference_mode():
                self.seen.append(output_margin(module(self.images), self.labels))


class Given(Classifier):
    def __init__(self, training: DataLoader, validation: DataLoader) -> None:
        super().__init__()
        self.training, self.validation = training, validation

    def train_dataloader(self) -> DataLoader:
        return self.training

    def val_dataloader(self) -> DataLoader:
        return self.validation


def loaders(training: Any = None, validation: Any = None) -> tuple[DataLoader, DataLoader]:
    return training or DataLoader(images(24, 1), 4, shuffle=True), validation or DataLoader(images(10, 2), 4)


RUNS: dict[str, tuple[tuple[DataLoader, DataLoader], dict[str, Any], Any, Any]] = {
    "validation": (loaders(), {}, images(10, 2), range(10)),
    "some of it": (loaders(), {"max_samples": 6}, images(10, 2), range(6)),
    "training": (loaders(), {"data": "train"}, images(24, 1), range(24)),
    "part of training": (
        loaders(DataLoader(images(24, 1), 4, sampler=SubsetRandomSampler(range(5, 15)))),
        {"data": "train"},
        images(24, 1),
        range(5, 15),
    ),
    "given": (loaders(), {"data": list(DataLoader(images(7, 3), 2))}, images(7, 3), range(7)),
}


@pytest.mark.parametrize(("given", "options", "dataset", "indices"), RUNS.values(), ids=RUNS)
def test_areas_in_a_training(tmp_path: Any, given: Any, options: dict[str, Any], dataset: Any, indices: Any) -> None:
    monitor, seen = FlatnessMonitor(per_sample=True, strict=True, **options), Margins(dataset)
    run = trainer(tmp_path, monitor, seen, max_epochs=3)
    run.fit(Given(*given))
    found = sorted(monitor.samples.suspicious(99))
    expected = torch.stack(seen.seen).mean(0)
    assert [each.index for each in found] == list(indices)
    assert [each.area for each in found] == pytest.approx(expected[list(indices)].tolist())
    assert [each.margin for each in found] == pytest.approx(seen.seen[-1][list(indices)].tolist())
    if options.get("data") != "train":
        run.validate(Given(*given), verbose=False)  # is none of the training's
    assert sorted(monitor.samples.suspicious(99)) == found


@pytest.mark.parametrize(
    "validation",
    [DataLoader(images(10, 2), 4, shuffle=True), DataLoader(images(10, 2), 4, sampler=SubsetRandomSampler(range(9)))],
)
def test_where_the_order_may_change_there_are_none(tmp_path: Any, validation: DataLoader) -> None:
    monitor = FlatnessMonitor(per_sample=True, strict=True)
    trainer(tmp_path, monitor).fit(Given(*loaders(validation=validation)))
    with pytest.raises(ValueError, match="shuffle=True"):
        monitor.samples.suspicious()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_knows_where_its_share_is(rank: int) -> None:
    data = torch.arange(11)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    run = SimpleNamespace(val_dataloaders=loader, world_size=2, global_rank=rank)
    own = torch.cat(list(loader))[: local_sample_count(run, 0)]
    assert list(sample_indices("val", run, 0, None)[: len(own)]) == own.tolist()
    assert sample_indices([data], run, 0, None) is None


def test_keeping_samples_changes_nothing(tmp_path: Any) -> None:
    left = []
    for options in ({}, {"per_sample": True}, {"per_sample": True, "data": "train"}):
        module = Classifier()
        run = trainer(tmp_path, FlatnessMonitor(strict=True, **options))
        run.fit(module)
        left.append(everything(module, run))
    assert left[0] == left[1] == left[2]
    assert FlatnessMonitor().samples is None


@pytest.mark.parametrize("where", ["train", "val"])
def test_wrong_labels_are_the_most_suspicious_samples(tmp_path: Any, where: str) -> None:
    parts = dict(zip(("train", "val"), digits_split(), strict=True))
    inputs, labels = parts[where].tensors
    count = len(labels) // 10
    wrong = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    labels = labels.index_put((wrong,), (labels[wrong] + 1 + wrong % 9) % 10)
    parts[where] = TensorDataset(inputs, labels)
    monitor = FlatnessMonitor(data=where, max_samples=1200, per_sample=True, strict=True)
    run = trainer(tmp_path, monitor, max_epochs=6)
    order = torch.Generator().manual_seed(0)
    run.fit(
        DigitsClassifier(), DataLoader(parts["train"], 32, shuffle=True, generator=order), DataLoader(parts["val"], 256)
    )
    found = {each.index for each in monitor.samples.suspicious(count)}
    assert len(found & set(wrong.tolist())) >= 0.9 * count
