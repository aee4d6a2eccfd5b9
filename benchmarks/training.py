"""The ResNet-20 before and after it has learnt handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator

import networks
import torch
from torch import Tensor, nn

from lightning_flatness.examples.digits import digits_split

SAMPLES, BATCH, EPOCHS = 256, 100, 3


def trained_on_digits() -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Yield the network, images and labels: as initialised, with seeded noise; trained, with validation's digits."""
    torch.manual_seed(0)
    model = networks.lively(networks.resnet20())
    yield model, torch.randn(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,))
    model.train().requires_grad_(True)
    (images, labels), (seen, true) = ((enlarged(part.tensors[0]), part.tensors[1]) for part in digits_split())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    yield model.eval(), seen[:SAMPLES], true[:SAMPLES]


def enlarged(digits: Tensor) -> Tensor:
    """Return grey 8 x 8 images as 3 x 32 x 32 ones."""
    return nn.functional.interpolate(digits, 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
