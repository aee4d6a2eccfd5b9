from __future__ import annotations

import sys

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_flatness.examples.digits import (
    DigitsClassifier,
    DigitsDataModule,
    ResidualGapNet,
    digits_split,
)


def pixels(images: Tensor) -> Tensor:
    """Undo the standardisation: the pixels of both parts range from 0 to 16."""
    return ((images - images.min()) / (images.max() - images.min()) * 16).round().flatten(1)


def sorted_rows(images: Tensor, targets: Tensor) -> list[list[float]]:
    return sorted(torch.cat([images, targets[:, None]], 1).tolist())


def test_the_parts_share_no_image_and_lose_none() -> None:
    training, validation = (part.tensors for part in digits_split(seed=0))
    assert (len(training[1]), len(validation[1])) == (1200, 597)
    both = torch.cat([pixels(training[0]), pixels(validation[0])]), torch.cat([training[1], validation[1]])
    everything = map(torch.as_tensor, load_digits(return_X_y=True))
    assert sorted_rows(*both) == sorted_rows(*everything)


def test_each_digit_has_its_share_in_both_parts() -> None:
    training, validation = (torch.bincount(part.tensors[1], minlength=10) for part in digits_split(seed=0))
    assert ((training - (training + validation) * 1200 / 1797).abs() <= 1).all()


def test_both_parts_are_standardised_by_the_training_part() -> None:
    (training, _), (validation, _) = (part.tensors for part in digits_split(seed=0))
    assert training.shape[1:] == validation.shape[1:] == (1, 8, 8)
    torch.testing.assert_close(torch.stack([training.mean(), training.std()]), torch.tensor([0.0, 1.0]))
    raw = pixels(training)
    torch.testing.assert_close(validation.flatten(1), (pixels(validation) - raw.mean()) / raw.std())


def test_the_seed_decides_split_and_order_alone() -> None:
    def first_batch(seed: int) -> Tensor:
        data = DigitsDataModule(seed, batch_size=16)
        data.setup("fit")
        torch.rand(seed + 1)  # other random draws must not change the order
        return next(iter(data.train_dataloader()))[0]

    one, again = first_batch(3), first_batch(3)
    assert one.shape == (16, 1, 8, 8)
    assert torch.equal(one, again)
    assert not torch.equal(one, first_batch(4))


def test_net_is_small_and_ends_in_a_convolution_with_a_spatial_map() -> None:
    net = ResidualGapNet()
    assert 24_000 <= sum(parameter.numel() for parameter in net.parameters()) <= 36_000
    maps: list[torch.Size] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, args, out: maps.append(out.shape))
    assert net(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert maps[-1] == (5, 28, 8, 8)


def test_classifier_learns_the_digits() -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule(seed=0))
    assert trainer.callback_metrics["val_accuracy"] > 0.97
    assert trainer.callback_metrics["train_loss"] < 0.1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_without_sklearn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[examples\]"):
        digits_split()
