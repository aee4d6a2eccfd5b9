"""How well the classifier's own trace and the margins predict each sample's exact Hessian trace, on trained networks.

Trains the digits network as the demo does, once per seed, and prints the Markdown table of docs/concepts/margins.md. It
holds Pearson's r over correctly classified samples, in brackets after removing outliers. The lines below it have the
range of r between the trace and the uncertainty `1 - |S|^2`, a factor of all these quantities, and the range of r
between trace and ACEHT without that factor.

    python benchmarks/margin_correlation.py
"""

from __future__ import annotations

import argparse

import lightning as L
import torch

from lightning_flatness import ForwardRecorder, PooledMethod, SampleQuantities
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule, digits_split
from lightning_flatness.functional import pearson
from lightning_flatness.metrics import FlatnessMarginCorrelation

COLUMNS = {"aceht": "ACEHT", "margin_bound": "margin bound", "output_margin": "output margin"}


def trained(seed: int, epochs: int) -> DigitsClassifier:
    """Return the network after the demo's training."""
    L.seed_everything(seed, verbose=False)
    model = DigitsClassifier()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=DigitsDataModule(seed))
    return model.eval()


def quantities_of(model: DigitsClassifier, images: torch.Tensor, digits: torch.Tensor) -> SampleQuantities:
    """Return the quantities of a whole data set."""
    with torch.no_grad(), ForwardRecorder(model) as recorder:
        loss = torch.nn.functional.cross_entropy(model(images), digits)
        return PooledMethod().quantities(recorder.take_pass(loss))


def row(quantities: SampleQuantities) -> list[str]:
    """Return the number of correct samples, and r for each column without and with outlier removal."""
    values = []
    for remove_outliers in (False, True):
        metric = FlatnessMarginCorrelation(remove_outliers)
        metric.update(quantities)
        values.append(metric.compute())
    kept, removed = values
    correct = int((quantities.output_margin >= 0).sum())
    pairs = ((float(kept[f"{name}/correct"]), float(removed[f"{name}/correct"])) for name in COLUMNS)
    return [f"{correct} of {len(quantities)}", *(f"{plain:.2f} ({without:.2f})" for plain, without in pairs)]


def shared_uncertainty(quantities: SampleQuantities) -> tuple[float, float]:
    """Return r of trace and uncertainty, and of trace and ACEHT with the uncertainty divided out of both."""
    correct = quantities.output_margin >= 0
    compared = (quantities.hessian_trace, quantities.affine_hessian_trace, quantities.confidence)
    trace, aceht, uncertainty = (values[correct].double() for values in compared)
    return float(pearson(trace, uncertainty)), float(pearson(trace / uncertainty, aceht / uncertainty))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    shared = []
    print("|", " | ".join(["seed", "samples", "correct", *COLUMNS.values()]), "|")
    print("|" + "---|" * (3 + len(COLUMNS)))
    for seed in range(arguments.seeds):
        model = trained(seed, arguments.epochs)
        for name, dataset in zip(("training", "validation"), digits_split(seed), strict=True):
            quantities = quantities_of(model, *dataset.tensors)
            print("|", " | ".join([str(seed), name, *row(quantities)]), "|")
            shared.append(shared_uncertainty(quantities))
    for what, values in zip(("trace, uncertainty", "trace, ACEHT without it"), zip(*shared, strict=True), strict=True):
        print(f"r of {what}: {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
