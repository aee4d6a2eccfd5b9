"""Trains the demo's network on clean labels, on noisy labels and with too high a rate, and writes the page of all."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule, html_report
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule


class NoisyDigits(DigitsDataModule):
    """Gives 30 % of the training images a random label."""

    def setup(self, stage: str) -> None:
        """Replace the labels of the training part; those of the validation part stay right."""
        super().setup(stage)
        labels, generator = self.training.tensors[1], torch.Generator().manual_seed(1)
        chosen = torch.randperm(len(labels), generator=generator)[: int(0.3 * len(labels))]
        labels[chosen] = torch.randint(10, (len(chosen),), generator=generator)


def train(logger: CSVLogger | TensorBoardLogger, data: DigitsDataModule, monitor: FlatnessMonitor, rate: float) -> None:
    """Train for thirty epochs."""
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=30, accelerator="cpu", logger=logger, callbacks=[monitor])
    trainer.fit(DigitsClassifier(learning_rate=rate), datamodule=data)


def main() -> None:
    """Train three times."""
    logs = "report-logs"
    rule = Rule("flatness/relative", above=20.0, name="too sharp", cooldown=8, action=ReduceLR(factor=0.5))
    train(TensorBoardLogger(logs, "clean"), DigitsDataModule(0), FlatnessMonitor(rules="default"), 0.05)
    train(TensorBoardLogger(logs, "label-noise"), NoisyDigits(0), FlatnessMonitor(rules="default"), 0.05)
    train(CSVLogger(logs, "rate-too-high"), DigitsDataModule(0), FlatnessMonitor(rules=[rule]), 1.0)
    Path("report.html").write_text(html_report(logs), encoding="utf-8")


if __name__ == "__main__":
    main()
