from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning_runs import Classifier, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule


class Rates(Callback):
    """Notes the learning rates of each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_validation_start(self, run: Trainer, module: LightningModule) -> None:
        if not run.sanity_checking:
            self.seen.append([group["lr"] for group in run.optimizers[0].param_groups])


def cutting() -> FlatnessMonitor:
    """A monitor that halves the learning rate after the second validation, and after the fifth."""
    rule = Rule("flatness/trace", above=0.0, warmup=1, cooldown=2, action=ReduceLR(0.5))
    return FlatnessMonitor(rules=[rule], strict=True)


class Finetuned(Classifier):
    def __init__(self, schedule: Callable[[Any], Any]) -> None:
        super().__init__()
        *backbone, self.head = self.net
        self.backbone = nn.Sequential(*backbone)
        self.schedule = schedule
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)
        return [optimizer], [self.schedule(optimizer)]


SCHEDULES = {"cosine": lambda o: CosineAnnealingLR(o, 20), "step": lambda o: StepLR(o, 2, 0.5)}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_backbone_finetuning_beside_a_cut(tmp_path: Any, schedule: Callable[[Any], Any]) -> None:
    def rates(*before: Callback, after: Sequence[Callback] = ()) -> list[list[float]]:
        finetuning = BackboneFinetuning(3, lambda epoch: 2.0, backbone_initial_ratio_lr=0.1, train_bn=False)
        seen = Rates()
        trainer(tmp_path, *before, finetuning, *after, seen, max_epochs=7).fit(Finetuned(schedule))
        return seen.seen

    full, cut = rates(), rates(cutting())
    assert cut == rates(after=[cutting()])
    assert [len(epoch) for epoch in cut] == [1, 1, 1, 2, 2, 2, 2]
    expected = [0.5 ** (epoch > 1) * 0.5 ** (epoch > 4) for epoch in range(7)]
    assert [now[0] / before[0] for now, before in zip(cut, full, strict=True)] == pytest.approx(expected)
    assert all(backbone <= head for head, *group in cut for backbone in group)


def test_plateau_on_a_key_beside_a_cut(tmp_path: Any) -> None:
    class Plateau(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            never_better = ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=1e9)
            scheduler = {"scheduler": never_better, "monitor": "flatness/relative"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    seen = Rates()
    trainer(tmp_path, cutting(), seen, max_epochs=7).fit(Plateau())
    expected = [0.1, 0.1, 0.005, 0.005, 0.0005, 0.00025, 0.000025]
    assert [lr for (lr,) in seen.seen] == pytest.approx(expected)
