"""Trains on several nodes: `python several_nodes.py NODES`, once on every node."""

import sys

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule


def main(nodes: int) -> None:
    """Validate the untrained network, then train it."""
    L.seed_everything(0)  # the same weights in every process
    model, data = DigitsClassifier(), DigitsDataModule()
    trainer = L.Trainer(
        num_nodes=nodes,
        devices=1,  # of each node; Lightning starts a process for every one
        strategy="ddp",
        max_epochs=2,
        logger=CSVLogger("."),
        enable_progress_bar=False,
        callbacks=[FlatnessMonitor(rules=[Rule("flatness/scale_free", above=0.0, action=ReduceLR(0.5))])],
    )
    trainer.validate(model, data)
    trainer.fit(model, data)


if __name__ == "__main__":
    main(int(sys.argv[1]))
