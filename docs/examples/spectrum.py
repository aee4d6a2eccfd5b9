"""Trains a small network on digits and draws the Hessian's spectrum of its last convolution."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_flatness import spectrum
from lightning_flatness.examples.digits import ResidualGapNet, digits_split


def main() -> None:
    """Train for five epochs, print the spectrum and draw it."""
    torch.manual_seed(0)
    training, validation = digits_split()
    model = ResidualGapNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for images, labels in DataLoader(training, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    found = spectrum(model, DataLoader(validation, batch_size=64), max_samples=200, loss="cross_entropy")
    print(found)
    found.plot().savefig("spectrum.png")


if __name__ == "__main__":
    main()
