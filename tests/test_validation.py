"""The measurement of one validation: which passes are recorded, and how many samples of which loader count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_runs import Classifier, hooks, images, report_of, trainer
from torch.utils.data import DataLoader, Subset

from lightning_flatness import ForwardRecorder, PooledMethod
from lightning_flatness.validation import MeasuredValidation


class Measures(Callback):
    """A `MeasuredValidation` without a monitor."""

    def __init__(self, data: Any = "val", max_samples: int | None = None) -> None:
        self.data, self.max_samples = data, max_samples

    def on_validation_epoch_start(self, run: Any, module: Any) -> None:
        recorder, method = ForwardRecorder(module), PooledMethod()
        self.validation = MeasuredValidation(recorder, method, run, module, self.data, self.max_samples, None)

    def on_validation_batch_start(self, run: Any, module: Any, batch: Any, index: int, loader: int = 0) -> None:
        self.validation.before_batch(loader, index == loader == 0)

    def on_validation_batch_end(
        self, run: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self.validation.after_batch(batch, loader)

    def on_validation_epoch_end(self, run: Any, module: Any) -> None:
        self.validation.close()
        self.values = list(self.validation.values("/mine"))


def validated(tmp_path: Any, measures: Measures, loaders: int = 1) -> Classifier:
    module = Classifier(loaders=loaders)
    trainer(tmp_path, measures).validate(module, verbose=False)
    assert hooks(module) == 0
    return module


@pytest.mark.parametrize("max_samples", [None, 1, 5, 99])
def test_each_loader_has_values_over_its_own_samples(tmp_path: Any, max_samples: int | None) -> None:
    measures = Measures(max_samples=max_samples)
    module = validated(tmp_path, measures, loaders=2)
    assert measures.validation.measured == "`net.conv2` up to `net.head`"
    for index, (values, loader) in enumerate(zip(measures.values, module.val_dataloader(), strict=True)):
        expected = report_of(module, loader, max_samples=max_samples)
        for key, value in expected.items():
            assert float(values[f"{key}/mine/dataloader_idx_{index}"]) == pytest.approx(value, rel=1e-12)


def test_own_batches_are_measured_once_before_the_first_batch(tmp_path: Any) -> None:
    own = DataLoader(Subset(images(9, 5), range(7)), batch_size=3)
    measures = Measures(data=own)
    module = validated(tmp_path, measures, loaders=2)
    (values,) = measures.values
    for key, value in report_of(module, own).items():
        assert float(values[f"{key}/mine"]) == pytest.approx(value, rel=1e-12)
    assert torch.is_grad_enabled()
