"""Which samples a process measures: a fixed sample of the training set, and each process's share of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

_SEED = 0
TRAINING_SAMPLES = 1024
"""How many samples of the training set are measured by default."""


def training_sample(trainer: Trainer, samples: int) -> DataLoader[Any]:
    """Return a loader of the same `samples` training samples at every call, this process's share of them.

    The samples are drawn once with a seed of their own and loaded in order, without shuffling.

    Raises:
        ValueError: if the Trainer has no training loader (only `fit` has one), or it cannot be indexed.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f'`data="train"` needs the one DataLoader that `Trainer.fit` trains on; got {type(loader).__name__}. '
            "Give the monitor its batches: `data=[(x, y), ...]` or a loader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            '`data="train"` needs a training set that can be indexed; got an IterableDataset. '
            "Give the monitor its batches: `data=[(x, y), ...]` or a loader."
        )
    order = torch.randperm(len(cast(Sized, loader.dataset)), generator=torch.Generator().manual_seed(_SEED))
    share = order[:samples].sort().values[trainer.global_rank :: trainer.world_size]
    return DataLoader(
        Subset(loader.dataset, share.tolist()),
        batch_size=loader.batch_size or 32,
        collate_fn=loader.collate_fn,
    )


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
    """Return the monitor's own batches that this process measures, and how many samples of them."""
    if isinstance(data, str):
        return training_sample(trainer, max_samples or TRAINING_SAMPLES), None
    if max_samples is None:  # every process takes its turn
        return islice(data, trainer.global_rank, None, trainer.world_size), None
    return data if trainer.is_global_zero else (), max_samples
