"""Puts the monitor's values among the metrics of Lightning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.keys import HEADLINE, logger_key, quantity

_HOOK = "on_test_epoch_end"
"""The hook under whose name the values are logged.

Lightning keeps metrics by hook and key, and refuses a key that is logged twice in one hook with different arguments. So
that a module may log what it likes, this is a hook that never runs in a validation.
"""


def log_values(
    trainer: Trainer, pl_module: LightningModule, values: Mapping[str, Tensor], prog_bar: bool = False
) -> None:
    """Log values that are the same on all processes; keys that the module logs itself are left to the module.

    Callbacks see all of them by their keys. Loggers have the headline by its keys, and the others by those of
    `keys.logger_key`, which callbacks see too: Lightning has no name for loggers alone.

    Must be called in `on_validation_epoch_end`. With `sync_dist=True` Lightning does not advise to use it, and with
    `rank_zero_only=True` it does not exchange the values again; since every process logs them, every process has them.
    """
    taken = keys_of_others(trainer, values)
    own = {key: value for key, value in values.items() if key not in taken}
    if not own:
        return
    headline = {key: value for key, value in own.items() if quantity(key) in HEADLINE}
    others = {key: value for key, value in own.items() if key not in headline}
    grouped = {logger_key(key): value for key, value in others.items()}
    as_they_are: dict[str, Any] = {"sync_dist": True, "rank_zero_only": True, "add_dataloader_idx": False}
    # Private attributes, as seen in Lightning 2.5.3 to 2.6.6; without them the hook would be the one that runs.
    connector = trainer._logger_connector
    hook, last = getattr(pl_module, "_current_fx_name", None), getattr(connector, "_current_fx", None)
    try:
        # Lightning would forget what has been logged in another hook before, another monitor's values.
        pl_module._current_fx_name = connector._current_fx = _HOOK
        pl_module.log_dict(headline, prog_bar=prog_bar, **as_they_are)
        pl_module.log_dict(others, logger=False, **as_they_are)
        pl_module.log_dict(grouped, **as_they_are)
    finally:
        pl_module._current_fx_name, connector._current_fx = hook, last


def keys_of_others(trainer: Trainer, keys: Collection[str]) -> list[str]:
    """Return those of the keys that the module, or another callback, has logged in this run."""
    found = {
        name
        for results in (trainer._results, trainer.fit_loop.epoch_loop._results)  # private, as above
        for metric in (results or {}).values()
        if metric.meta.fx != _HOOK
        for name in _names(metric.meta)
    }
    return [key for key in keys if key in found]


def forget(trainer: Trainer, keys: Collection[str]) -> None:
    """Let Lightning forget what was logged under these keys in the last validation; it would log it again.

    Must be called in `on_validation_epoch_start`. What other callbacks see stays.
    """
    results: Mapping[str, Any] = trainer._results or {}  # private, as above
    for key in _with_logger_keys(keys):
        if (metric := results.get(f"{_HOOK}.{key}")) is not None:
            metric.reset()


def collision(keys: Collection[str]) -> str:
    """Return the sentence about keys that the module logs itself."""
    return (
        f"does not log {sorted(keys)}: the module, or another callback, logs a metric of this name itself. Give the "
        "monitor's keys an ending of their own with `name=...`."
    )


def mark_missing(trainer: Trainer, keys: Collection[str]) -> None:
    """Let the metrics that callbacks see be NaN where they are the values of an earlier validation."""
    # Private, as above: the public property would compute all metrics, before the module has finished with them.
    metrics: dict[str, Any] = trainer._logger_connector._callback_metrics
    for key in _with_logger_keys(set(keys).difference(keys_of_others(trainer, keys))):
        if key in metrics:
            metrics[key] = torch.full_like(metrics[key], torch.nan)


def _with_logger_keys(keys: Collection[str]) -> set[str]:
    return {*keys, *map(logger_key, keys)}


def _names(meta: Any) -> list[str]:
    """Return under which keys users see a metric."""
    loader = (
        f"/dataloader_idx_{meta.dataloader_idx}" if meta.add_dataloader_idx and meta.dataloader_idx is not None else ""
    )
    names = [meta.name] + [f"{meta.name}_{part}" for part in ("step", "epoch") if meta.on_step and meta.on_epoch]
    return [f"{name}{loader}" for name in names]
