"""Times exact traces of each sample of a whole LeNet-5, and projects to the 60,000 images of MNIST.

Usage: `python benchmarks/per_sample_traces.py [SAMPLES]`. The images are random numbers of MNIST's size: the operations
are the same for any images. Processor time of one thread is counted, which other work on the machine disturbs least.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from lightning_flatness import measure

MNIST = 60_000
BATCH = 500


def lenet5() -> nn.Sequential:
    """Return LeNet-5 with rectifiers, for 28 x 28 images."""
    features = (
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    head = nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    return nn.Sequential(*features, nn.Flatten(), *head)


def main() -> None:
    """Measure, and print the seconds."""
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 6000
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lenet5()
    batches = [(torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))) for _ in range(samples // BATCH)]
    options = {"method": "jacobian", "layer": "all", "loss": "cross_entropy", "per_sample": True}
    measure(model, batches[:1], **options)  # warm
    start = time.process_time()
    report = measure(model, batches, **options)
    seconds = time.process_time() - start
    count = len(report.samples["network_trace"])
    print(f"torch {torch.__version__}, one thread, {sum(map(torch.numel, model.parameters())):,} parameters")
    print(f"{count:,} traces of the whole network, and of its five layers, exactly: {seconds:.1f} s")
    print(f"projected to {MNIST:,}: {seconds / count * MNIST:.0f} s")


if __name__ == "__main__":
    main()
