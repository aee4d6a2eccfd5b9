"""Whose samples are measured: a fixed sample of the training set, and each process's share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

_SEED = 0
TRAINING_SAMPLES = 1024


def training_probe(trainer: Trainer, samples: int) -> DataLoader[Any]:
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


def share_of(trainer: Trainer, loader: int) -> int | None:
    """Return how many samples of a validation loader are this process's own; None: all that it gets.

    A `DistributedSampler` fills up the shares with samples that another process has too. Number `i` in the share of
    process `r` of `w` is number `r + i w` of its order, so the padding is known by its position.
    """
    chosen = CombinedLoader(trainer.val_dataloaders, "sequential").flattened[loader]
    sampler = getattr(chosen, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))


def allowance(trainer: Trainer, loader: int, max_samples: int | None) -> int | None:
    """Return how many samples of a validation loader this process may measure; None: all that it gets."""
    limits = [share_of(trainer, loader)] if trainer.world_size > 1 else []
    if max_samples is not None:
        limits.append(len(range(trainer.global_rank, max_samples, trainer.world_size)))
    return min((limit for limit in limits if limit is not None), default=None)


def own_batches(data: Any, trainer: Trainer, max_samples: int | None) -> tuple[Iterable[Any], int | None]:
    """Return the batches of its own that the monitor measures in this process, and how many samples of them."""
    if isinstance(data, str):
        return training_probe(trainer, max_samples or TRAINING_SAMPLES), None
    if max_samples is None:  # every process takes its turn
        return islice(data, trainer.global_rank, None, trainer.world_size), None
    return data if trainer.is_global_zero else (), max_samples


def moved(batches: Any, trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield batches as the module's own steps get them: in its precision, on its device, after its hooks."""
    module = trainer.datamodule  # type: ignore[attr-defined]

    def hook(name: str) -> Callable[..., Any]:
        own = module is None or is_overridden(name, pl_module)  # Lightning prefers the LightningModule's
        owner = module if not own and is_overridden(name, module, parent=DataHooks) else pl_module
        return cast(Callable[..., Any], getattr(owner, name))

    for batch in batches:
        batch = hook("on_before_batch_transfer")(trainer.precision_plugin.convert_input(batch), 0)
        batch = hook("transfer_batch_to_device")(batch, pl_module.device, 0)
        yield hook("on_after_batch_transfer")(batch, 0)


def network(pl_module: LightningModule) -> nn.Module:
    """Return what can be called with inputs: the module itself if it defines `forward`, else its one network.

    Raises:
        ValueError: if there is not exactly one.
    """
    if type(pl_module).forward is not LightningModule.forward:
        return pl_module
    holders = {
        name: child
        for name, child in pl_module.named_children()
        if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in child.modules())
    }
    if len(holders) != 1:
        raise ValueError(
            f"The monitor must know what to call with its own batches: `{type(pl_module).__name__}` has no `forward`, "
            f"and {len(holders)} networks: {sorted(holders)}. Define `forward(self, inputs)` that returns the logits."
        )
    return next(iter(holders.values()))
