"""Which samples a process measures: a fixed sample of the training set, and each process's share of the others."""

from __future__ import annotations

import copy
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_flatness.data.randomness import Randomness

_SEED = 0
_BATCH_SIZE = 32  # where the training loader has none
_MOST_DRAWN = 100_000  # from a sampler of unknown length
_REMEDY = "Give the monitor its batches: `data=[(x, y), ...]` or a loader."
TRAINING_SAMPLES = 1024
"""How many samples of the training set are measured by default."""


class TrainingSample:
    """This process's share of a fixed sample of the training set, in batches like those of training.

    The samples are loaded anew in every iteration, in the same order. While a sample is loaded, all random generators
    of the CPU have a state that depends on its key only, so random augmentation is the same each time, in any number
    of processes. Afterwards they are as they were. If the training loader has workers, so has this one: the data set
    of the training's process is then not touched.

    Args:
        loader: the training loader.
        keys: of the samples in the data set; of its batches if `loader.batch_size` is None.
        limit: how many samples may be measured; None: all.
        description: how many samples of what, over all processes.
    """

    def __init__(self, loader: DataLoader[Any], keys: Sequence[Any], limit: int | None, description: str) -> None:
        self._loader, self.keys = loader, keys
        self.limit = limit
        self.description = description

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; the random generators are as they were whenever one has been yielded."""
        loader = self._loader
        samples = _Samples(loader, self.keys)
        size = None if _yields_whole_batches(loader) else _batch_size(loader) or _BATCH_SIZE
        workers = min(loader.num_workers, -(-len(self.keys) // (size or 1)))
        options: dict[str, Any] = {}
        if workers:
            options["multiprocessing_context"] = loader.multiprocessing_context
            options["worker_init_fn"], options["timeout"] = loader.worker_init_fn, loader.timeout
        # In the training's process only, its generators have to be preserved.
        preserved = Randomness(None).preserved if workers else samples.randomness.preserved
        with preserved():
            generator = torch.Generator().manual_seed(_SEED)
            made = DataLoader(
                samples, size, collate_fn=loader.collate_fn, num_workers=workers, generator=generator, **options
            )
            batches = iter(made)
        while True:
            with preserved():
                batch = next(batches, self)
            if batch is self:
                return
            yield batch


class _Samples(Dataset[Any]):
    """Samples of a data set by their keys, each loaded with random numbers of its own."""

    def __init__(self, loader: DataLoader[Any], keys: Sequence[Any]) -> None:
        self.dataset, self.keys = loader.dataset, keys
        self.randomness = Randomness([loader.dataset, loader.collate_fn])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        self.randomness.seed(self.keys[index])
        return self.dataset[self.keys[index]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        together = getattr(self.dataset, "__getitems__", None)
        if not callable(together):
            return [self[index] for index in indices]
        keys = [self.keys[index] for index in indices]
        self.randomness.seed(keys[0])
        return together(keys)


class _Drawn(NamedTuple):
    """What a training loader yields: the keys, whether they are those of this process alone."""

    keys: Sequence[Any]
    is_share: bool


def training_sample(trainer: Trainer, samples: int) -> TrainingSample:
    """Return the same `samples` training samples at every call, this process's share of them.

    They are drawn once, with a seed of their own, from what the training loader yields: from the samples that its
    sampler may draw, or from the first batches if it reads in order and the number of batches is limited. A sampler of
    an unknown kind is copied, and the copy is asked for one epoch.

    Raises:
        ValueError: if the Trainer has no training loader (only `fit` has one) or several, or it cannot be indexed.
    """
    loader = _training_loader(trainer)
    count = _batches_per_epoch(trainer, loader)
    rank, world = trainer.global_rank, trainer.world_size
    drawn = _drawn(loader, count)
    whole = _yields_whole_batches(loader)
    order = torch.randperm(len(drawn.keys), generator=torch.Generator().manual_seed(_SEED))
    share = len(range(rank, samples, world))
    if whole:  # how many samples they hold is known when they are loaded
        indices = order if drawn.is_share else order[rank::world]
        description = f"at most {samples} samples of the {len(drawn.keys)} batches that the training loader yields"
    else:
        indices = order[:share] if drawn.is_share else order[:samples].sort().values[rank::world]
        count = min(samples, len(drawn.keys) * (world if drawn.is_share else 1))
        description = f"{count} of the {len(drawn.keys)} samples that the training loader yields"
    return TrainingSample(loader, [drawn.keys[i] for i in indices.tolist()], share if whole else None, description)


def _training_loader(trainer: Trainer) -> DataLoader[Any]:
    """Return the one DataLoader that `fit` trains on; a list or dictionary of one is that one."""
    given = trainer.train_dataloader
    loaders = [] if given is None else CombinedLoader(given, "sequential").flattened
    if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
        raise ValueError(
            '`data="train"` needs the one DataLoader that `Trainer.fit` trains on; '
            f"got {type(given).__name__}. {_REMEDY}"
        )
    if isinstance(loaders[0].dataset, IterableDataset):
        raise ValueError(f'`data="train"` needs a training set that can be indexed; got an IterableDataset. {_REMEDY}')
    return loaders[0]


def _yields_whole_batches(loader: DataLoader[Any]) -> bool:
    """Return whether an item of the data set is a batch."""
    return loader.batch_sampler is None


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Return how many samples a batch has; None if the batch sampler does not say."""
    sampler: Any = loader.batch_sampler
    return loader.batch_size or (sampler.batch_size if _is(sampler, BatchSampler) else None)


def _batches_per_epoch(trainer: Trainer, loader: DataLoader[Any]) -> int | None:
    """Return how many batches this process trains on in an epoch; None: nobody knows."""
    limits = [getattr(trainer, "num_training_batches", float("inf"))]
    with suppress(TypeError):  # of a sampler without a length
        limits.append(len(loader))
    return None if min(limits) == float("inf") else int(min(limits))


def _drawn(loader: DataLoader[Any], batches: int | None) -> _Drawn:
    """Return what a training loader yields; found out once, since a sampler may take long, or change."""
    known = _DRAWN.setdefault(loader, {})
    if batches not in known:
        size = 1 if _yields_whole_batches(loader) else _batch_size(loader)
        sampler: Any = loader.sampler
        if not _yields_whole_batches(loader):
            sampler = loader.batch_sampler
            if _is(sampler, BatchSampler):
                sampler = sampler.sampler
            else:  # its items are lists of keys
                keys = list(chain.from_iterable(_epoch(sampler, loader, batches)))
                known[batches] = _Drawn(_compact(keys), _is_share(sampler))
                return known[batches]
        count = batches * size if batches is not None and size else None
        known[batches] = _Drawn(_compact(_pool(sampler, loader, count)), _is_share(sampler))
    return known[batches]


_DRAWN: WeakKeyDictionary[DataLoader[Any], dict[int | None, _Drawn]] = WeakKeyDictionary()


def _compact(keys: Sequence[Any]) -> Sequence[Any]:
    """Return a list of whole numbers in 8 bytes each: it is kept as long as the training loader."""
    return array("q", keys) if isinstance(keys, list) and all(type(key) is int for key in keys) else keys


def _pool(sampler: Any, loader: DataLoader[Any], count: int | None) -> Sequence[Any]:
    """Return the keys that a sampler may yield, if it reads in order the first `count` of each process."""
    if _is(sampler, SequentialSampler):
        return range(len(sampler.data_source))[:count]
    if _is(sampler, RandomSampler):
        return range(len(sampler.data_source))
    if _is(sampler, SubsetRandomSampler):
        return sampler.indices
    if _is(sampler, WeightedRandomSampler):
        possible = sampler.weights.nonzero().flatten()
        if len(sampler.weights[possible].unique()) == 1:
            return possible.tolist()
    if _shares_known_keys(sampler):
        first = None if sampler.shuffle or count is None else count * sampler.num_replicas
        wrapped = getattr(sampler.dataset, "_sampler", None)  # by Lightning, 2.6.6
        return range(len(cast(Sized, sampler.dataset)))[:first] if wrapped is None else _pool(wrapped, loader, first)
    return _epoch(sampler, loader, count)


def _epoch(sampler: Any, loader: DataLoader[Any], count: int | None) -> list[Any]:
    """Return the first keys, or lists of keys, that a copy of a sampler yields."""
    holders = [holder for holder in (sampler, getattr(sampler, "sampler", None)) if hasattr(holder, "__dict__")]
    parts = [loader.dataset, *chain.from_iterable(vars(holder).values() for holder in holders)]
    # Data sets are not copied, but Lightning's wrapper of a sampler is one.
    memo = {id(part): part for part in parts if isinstance(part, Dataset) and not hasattr(part, "_sampler")}
    try:
        copied = copy.deepcopy(sampler, memo)
    except Exception as error:
        raise ValueError(
            f'`data="train"` needs a sampler that can be copied; {type(sampler).__name__} cannot: {error}. {_REMEDY}'
        ) from error
    randomness = Randomness(copied)
    with randomness.preserved():
        randomness.seed(_SEED)
        if hasattr(copied, "set_epoch"):
            copied.set_epoch(0)
        return list(islice(copied, _MOST_DRAWN if count is None else count))


def _is(sampler: Any, kind: Any) -> bool:
    """Return whether a sampler yields what this kind of sampler yields: it has no `__iter__` of its own."""
    return isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__


def _shares_known_keys(sampler: Any) -> bool:
    """Return whether it is torch's `DistributedSampler`, or Lightning's around another sampler."""
    is_wrapper = hasattr(getattr(sampler, "dataset", None), "_sampler")
    return _is(sampler, DistributedSampler) or (isinstance(sampler, DistributedSampler) and is_wrapper)


def _is_share(sampler: Any) -> bool:
    """Return whether a sampler of an unknown kind yields the keys of one process only."""
    inner = getattr(sampler, "sampler", None)
    return any(getattr(each, "num_replicas", 1) > 1 for each in (sampler, inner)) and not _shares_known_keys(sampler)


def ordered_source(data: Any, trainer: Trainer, loader: int) -> Any:
    """Return what the samples of a validation come from if each iteration yields them in the same order, else None.

    Args:
        data: of the `FlatnessMonitor`.
        trainer: the Trainer that validates.
        loader: index of the validation loader.
    """
    if isinstance(data, str) and data == "train":  # a fixed sample
        return trainer.train_dataloader
    if isinstance(data, str):
        data = CombinedLoader(trainer.val_dataloaders, "sequential").flattened[loader]
    return data if isinstance(data, (list, tuple)) or _reads_in_order(data) else None


def sample_indices(data: Any, trainer: Trainer, loader: int, max_samples: int | None) -> Sequence[Any] | None:
    """Return the indices of the samples that this process measures, in the order of the measurement, or of more.

    They are those of the training set for `"train"`, else positions in the validation loader or the given batches.

    Args:
        data: of the `FlatnessMonitor`; the order of its samples is known.
        trainer: the Trainer that validates.
        loader: index of the validation loader.
        max_samples: of the `FlatnessMonitor`.

    Returns:
        The indices; None if they are not known.
    """
    if isinstance(data, str) and data == "train":
        sample = training_sample(trainer, max_samples or TRAINING_SAMPLES)
        return None if sample.limit is not None else sample.keys  # keys of whole batches
    if isinstance(data, str):
        sampler = getattr(CombinedLoader(trainer.val_dataloaders, "sequential").flattened[loader], "sampler", None)
        share = (sampler.rank, sampler.num_replicas) if isinstance(sampler, DistributedSampler) else (0, 1)
        return range(share[0], sys.maxsize, share[1])
    return range(sys.maxsize) if trainer.world_size == 1 else None


def _reads_in_order(loader: Any) -> bool:
    if not _is(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler: Any = loader.sampler
    if not _yields_whole_batches(loader):
        if not _is(loader.batch_sampler, BatchSampler):
            return False
        sampler = loader.batch_sampler.sampler
    if _shares_known_keys(sampler) and not sampler.shuffle:
        sampler = getattr(sampler.dataset, "_sampler", SequentialSampler(()))  # by Lightning, 2.6.6
    return _is(sampler, SequentialSampler)


def local_sample_count(trainer: Trainer, loader: int) -> int | None:
    """Return how many samples of a validation loader are this process's own; None: all that it gets.

    A `DistributedSampler` fills up the shares with samples that another process has, too. Number `i` in the share of
    process `r` of `w` is number `r + i w` of its order, so the padding is known by its position.
    """
    chosen = CombinedLoader(trainer.val_dataloaders, "sequential").flattened[loader]
    sampler = getattr(chosen, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))


def sample_limit(trainer: Trainer, loader: int, max_samples: int | None) -> int | None:
    """Return how many samples of a validation loader this process may measure; None: all that it gets."""
    limits = [local_sample_count(trainer, loader)] if trainer.world_size > 1 else []
    if max_samples is not None:
        limits.append(len(range(trainer.global_rank, max_samples, trainer.world_size)))
    return min((limit for limit in limits if limit is not None), default=None)


def batches_for_rank(data: Any, trainer: Trainer, max_samples: int | None) -> tuple[Iterable[Any], int | None]:
    """Return the monitor's own batches that this process measures, and how many samples of them.

    Those of the training set are a `TrainingSample`, whose `description` says how many samples of what they are.
    """
    if isinstance(data, str):
        sample = training_sample(trainer, max_samples or TRAINING_SAMPLES)
        return sample, sample.limit
    if max_samples is None:  # every process takes its turn
        return islice(data, trainer.global_rank, None, trainer.world_size), None
    return data if trainer.is_global_zero else (), max_samples
