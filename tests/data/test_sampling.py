"""Which samples a process measures."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback
from lightning_runs import Classifier, images, trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_flatness import FlatnessMonitor
from lightning_flatness.data.sampling import local_sample_count, training_sample


class Numbers(Dataset):
    """Sample `i` is the number `i`; has no tensors, and counts what is read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.read.append(index)
        return index, index % 3


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from ()


def trainer_of(loader: Any, rank: int = 0, world: int = 1, batches: float = math.inf) -> Any:
    return SimpleNamespace(train_dataloader=loader, global_rank=rank, world_size=world, num_training_batches=batches)


def drawn(loader: Iterable[Any]) -> list[int]:
    return [int(number) for numbers, _ in loader for number in numbers]


@pytest.mark.parametrize("size", [5, 64, 1000])
@pytest.mark.parametrize("samples", [1, 20, 64, 200])
def test_shares_are_disjoint_and_the_same_samples_each_time(samples: int, size: int) -> None:
    """However many processes there are, and whatever the order of the training loader and the random state."""
    dataset = Numbers(size)
    loader = DataLoader(dataset, batch_size=7, shuffle=True)
    whole = drawn(training_sample(trainer_of(loader), samples))
    assert whole == sorted(set(whole))
    assert len(whole) == min(samples, size)
    assert dataset.read == whole  # nothing else was loaded
    for world in (2, 3):
        torch.manual_seed(world)
        shares = [drawn(training_sample(trainer_of(loader, rank, world), samples)) for rank in range(world)]
        assert sorted(chain(*shares)) == whole
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_samples_are_drawn_from_everywhere_without_touching_the_random_state() -> None:
    loader = DataLoader(Numbers(10_000), batch_size=32)
    state = torch.get_rng_state()
    probe = training_sample(trainer_of(loader), 1000)
    next(iter(probe))
    assert torch.equal(torch.get_rng_state(), state)
    assert 4500 < sum(drawn(probe)) / 1000 < 5500


def collated(samples: list[Any]) -> Any:
    return default_collate([(number + 100, label) for number, label in samples])


def test_batches_like_those_of_training() -> None:
    probe = training_sample(trainer_of(DataLoader(Numbers(64), batch_size=7, collate_fn=collated, shuffle=True)), 20)
    numbers, labels = next(iter(probe))
    assert len(labels) == 7
    assert bool((numbers >= 100).all())
    sampler = torch.utils.data.BatchSampler(range(64), 5, drop_last=False)
    assert len(drawn(training_sample(trainer_of(DataLoader(Numbers(64), batch_sampler=sampler)), 20))) == 20


class Backwards(Sampler):
    """A sampler of an unknown kind, which remembers how often it was asked, and draws from a generator of its own."""

    def __init__(self, data: Numbers, sized: bool = True) -> None:
        self.data, self.asked, self.generator = data, 0, torch.Generator().manual_seed(0)
        if sized:
            self.size = len(data)

    def __len__(self) -> int:
        if "size" not in vars(self):
            raise TypeError("endless")
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        torch.randperm(3, generator=self.generator)
        while True:
            yield from range(len(self.data) - 1, 9, -1)
            if "size" in vars(self):
                return


class Pairs(BatchSampler):
    """A batch sampler of a kind of its own: each sample with its neighbour."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size // 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[i, i + 1] for i in range(0, self.size, 2)])


DATA = Numbers(20)
ORDERED, SUBSET = SequentialSampler(DATA), SubsetRandomSampler([3, 5, 7, 11])
# A training loader, how many batches of it are trained on, and what those hold.
LOADERS: dict[str, tuple[Any, float, Any]] = {
    "in order": (DataLoader(DATA, 4), math.inf, range(20)),
    "the first batches": (DataLoader(DATA, 4), 2, range(8)),
    "the last batch is dropped": (DataLoader(DATA, 8, drop_last=True), math.inf, range(16)),
    "shuffled": (DataLoader(DATA, 4, shuffle=True), 2, range(20)),
    "held out": (DataLoader(DATA, 4, sampler=SUBSET), math.inf, [3, 5, 7, 11]),
    "held out, few batches": (DataLoader(DATA, 2, sampler=SUBSET), 1, [3, 5, 7, 11]),
    "without some": (
        DataLoader(DATA, 4, sampler=WeightedRandomSampler([0.0] * 15 + [2.0] * 5, 40)),
        math.inf,
        range(15, 20),
    ),
    "a list of one": ([DataLoader(DATA, 4)], math.inf, range(20)),
    "a dictionary of one": ({"a": DataLoader(DATA, 4, sampler=SUBSET)}, math.inf, [3, 5, 7, 11]),
    "another sampler": (DataLoader(DATA, 4, sampler=Backwards(DATA)), math.inf, range(10, 20)),
    "another sampler, few batches": (DataLoader(DATA, 4, sampler=Backwards(DATA)), 1, range(16, 20)),
    "an endless sampler": (DataLoader(DATA, 4, sampler=Backwards(DATA, sized=False)), 2, range(12, 20)),
    "a batch sampler": (DataLoader(DATA, batch_sampler=BatchSampler(SUBSET, 3, False)), math.inf, [3, 5, 7, 11]),
    "a batch sampler, few": (DataLoader(DATA, batch_sampler=BatchSampler(ORDERED, 3, False)), 2, range(6)),
    "another batch sampler": (DataLoader(DATA, batch_sampler=Pairs(20)), math.inf, range(20)),
    "another batch sampler, few": (DataLoader(DATA, batch_sampler=Pairs(20)), 3, range(6)),
}


@pytest.mark.parametrize(("loader", "batches", "expected"), LOADERS.values(), ids=LOADERS)
def test_only_what_the_training_loader_yields_is_measured(loader: Any, batches: float, expected: Any) -> None:
    sample = training_sample(trainer_of(loader, batches=batches), 64)
    assert sorted(drawn(sample)) == list(expected)
    assert sample.description == f"{len(expected)} of the {len(expected)} samples that the training loader yields"
    few = [drawn(training_sample(trainer_of(loader, rank, 2, batches), 3)) for rank in range(2)]
    assert len({*few[0], *few[1]}) == 3
    assert {*few[0], *few[1]} <= set(expected)


def test_a_sampler_is_not_disturbed() -> None:
    sampler = Backwards(DATA)
    loader = DataLoader(DATA, 4, sampler=sampler)
    state = sampler.generator.get_state()
    first, again = (drawn(training_sample(trainer_of(loader), 5)) for _ in range(2))
    assert first == again
    assert sampler.asked == 0
    assert torch.equal(sampler.generator.get_state(), state)


def test_unequal_weights_are_drawn_by() -> None:
    sampler = WeightedRandomSampler([1.0] * 10 + [9.0] * 10, 4000)
    numbers = drawn(training_sample(trainer_of(DataLoader(DATA, 4, sampler=sampler)), 2000))
    assert 0.85 < sum(number >= 10 for number in numbers) / 2000 < 0.95


def test_an_endless_sampler_of_unknown_length_ends() -> None:
    loader = DataLoader(DATA, 4, sampler=Backwards(DATA, sized=False))
    assert set(drawn(training_sample(trainer_of(loader), 500))) == set(range(10, 20))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batches", [2, math.inf])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("wrapped", [None, ORDERED, SUBSET])
def test_shares_of_a_distributed_sampler(wrapped: Any, shuffle: bool, batches: float, world: int) -> None:
    """As Lightning puts them in: all processes together measure what all of them train on."""
    expected = {3, 5, 7, 11} if wrapped is SUBSET else set(range(20))
    if not shuffle and batches == 2 and wrapped is not SUBSET:
        expected = set(range(min(20, 2 * 3 * world)))
    measured = []
    for rank in range(world):
        kind: Any = (DistributedSampler, DATA) if wrapped is None else (DistributedSamplerWrapper, wrapped)
        loader = DataLoader(DATA, 3, sampler=kind[0](kind[1], world, rank, shuffle))
        measured += drawn(training_sample(trainer_of(loader, rank, world, batches), 64))
    assert sorted(measured) == sorted(expected)


class OwnShare(DistributedSampler):
    """Yields twice what torch's yields, as samplers of repeated augmentation do."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __iter__(self) -> Iterator[int]:
        return iter([index for index in super().__iter__() for _ in range(2)])


def test_a_share_of_another_kind_is_that_of_its_process() -> None:
    loader = DataLoader(DATA, 4, sampler=OwnShare(DATA, 2, 1, shuffle=False))
    assert set(drawn(training_sample(trainer_of(loader, 1, 2), 64))) == set(range(1, 20, 2))
    assert len(drawn(training_sample(trainer_of(loader, 1, 2), 7))) == 3


class Whole(Dataset):
    """Item `i` is a batch of four."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return torch.arange(4 * index, 4 * index + 4), torch.zeros(4)


def test_whole_batches() -> None:
    loader = DataLoader(Whole(), batch_size=None)
    sample = training_sample(trainer_of(loader), 8)
    assert sorted(drawn(sample)) == list(range(20))  # as many as the limit says are measured
    assert sample.limit == 8
    assert sample.description == "at most 8 samples of the 5 batches that the training loader yields"
    shares = [training_sample(trainer_of(loader, rank, 2), 7) for rank in range(2)]
    assert sorted(drawn(shares[0]) + drawn(shares[1])) == list(range(20))
    assert [share.limit for share in shares] == [4, 3]
    by_list = BatchSampler(ORDERED, 8, False)
    loader = DataLoader(images(20, 1), batch_size=None, sampler=by_list)
    assert sorted(len(y) for _, y in training_sample(trainer_of(loader), 64)) == [4, 8, 8]


class Fetches(Numbers):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(index, 0) for index in indices]

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("one by one")


def test_a_data_set_that_fetches_many_at_once() -> None:
    assert drawn(training_sample(trainer_of(DataLoader(Fetches(9), 4)), 64)) == list(range(9))


class Augmented(TensorDataset):
    """Adds noise from a generator of its own and from the global ones."""

    def __init__(self) -> None:
        super().__init__(*images(24, 1).tensors)
        self.own, self.opened = np.random.default_rng(0), 0

    def __getitem__(self, index: int) -> Any:
        self.opened += 1
        x, y = super().__getitem__(index)
        return x + 0.5 * torch.randn_like(x) + self.own.random() + random.random() + np.random.rand(), y


class Still(Classifier):
    """Trains on what a generator of its own shuffles, without moving."""

    def __init__(self, workers: int = 0, rate: float = 0.0) -> None:
        super().__init__()
        self.workers, self.rate, self.data = workers, rate, Augmented()

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self.data, 4, shuffle=True, num_workers=self.workers, generator=generator)

    def on_train_epoch_start(self) -> None:
        for norm in (self.net.norm1, self.net.norm2):
            norm.eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate)


class Values(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            self.seen.append(float(run.callback_metrics["flatness/trace/train"]))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_augmented_samples_are_the_same_each_time(tmp_path: Any, workers: int) -> None:
    module, values = Still(workers), Values()
    trainer(tmp_path, FlatnessMonitor(data="train", strict=True), values, max_epochs=3).fit(module)
    assert len(values.seen) == 3
    assert values.seen == pytest.approx([values.seen[0]] * 3, rel=1e-12)
    assert not (workers and module.data.opened)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_with_augmentation_is_not_changed(tmp_path: Any, workers: int) -> None:
    results = []
    for monitors in ([], [FlatnessMonitor(data="train", strict=True)]):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        module = Still(workers, rate=0.1)
        trainer(tmp_path, *monitors, max_epochs=3).fit(module)
        results.append([module.state_dict(), module.data.own.bit_generator.state, random.getstate(), torch.rand(3)])
    assert repr(results[0]) == repr(results[1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values(), strict=True))


def test_a_sampler_that_cannot_be_copied() -> None:
    sampler = Backwards(DATA)
    sampler.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"sampler that can be copied; Backwards cannot.*data=\["):
        training_sample(trainer_of(DataLoader(DATA, 4, sampler=sampler)), 8)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "got NoneType"),
        ([DataLoader(Numbers(3)), DataLoader(Numbers(3))], "one DataLoader.*got list"),
        ({"a": DataLoader(Numbers(3)), "b": DataLoader(Numbers(3))}, "got dict"),
        (iter([]), "got list_iterator"),
        (DataLoader(Stream()), "IterableDataset"),
    ],
)
def test_training_data_that_cannot_be_indexed(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*\n?.*data=\["):
        training_sample(trainer_of(loader), 8)


@pytest.mark.parametrize("size", [1, 7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_sample_counts_twice_where_the_sampler_pads(shuffle: bool, world: int, size: int) -> None:
    samplers = [DistributedSampler(Numbers(size), world, rank, shuffle) for rank in range(world)]
    counted = []
    for sampler in samplers:
        trainer: Any = SimpleNamespace(val_dataloaders=[DataLoader(sampler.dataset, sampler=sampler)])
        counted += list(sampler)[: local_sample_count(trainer, 0)]
    assert sorted(counted) == list(range(size))


@pytest.mark.parametrize(
    "sampler",
    [None, DistributedSampler(Numbers(9), 2, 0, drop_last=True)],
)
def test_share_without_padding_that_is_known(sampler: Any) -> None:
    loader = DataLoader(Numbers(9), sampler=sampler)
    assert local_sample_count(SimpleNamespace(val_dataloaders=loader), 0) is None
