"""Trains the demo's network and draws the figure of the training, in light and in dark."""

import lightning as L

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule


def main() -> None:
    """Train for eight epochs."""
    L.seed_everything(0)
    rule = Rule("flatness/relative", above=20.0, name="too sharp", cooldown=8, action=ReduceLR(factor=0.5))
    monitor = FlatnessMonitor(rules=[rule], prog_bar=True)
    trainer = L.Trainer(max_epochs=8, accelerator="cpu", callbacks=[monitor])
    trainer.fit(DigitsClassifier(), datamodule=DigitsDataModule(0))
    monitor.figure().savefig("dashboard.png")
    monitor.figure(dark=True).savefig("dashboard-dark.png")


if __name__ == "__main__":
    main()
