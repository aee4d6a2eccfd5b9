"""Which samples a process measures."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

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


def trainer_of(loader: Any, rank: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(train_dataloader=loader, global_rank=rank, world_size=world)


def drawn(loader: DataLoader) -> list[int]:
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


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "got NoneType"),
        ([DataLoader(Numbers(3)), DataLoader(Numbers(3))], "one DataLoader.*got list"),
        ({"a": DataLoader(Numbers(3))}, "got dict"),
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
