"""The networks that are measured, small enough to read and built from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

INVERTED = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the map's size at stride 1, and its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """`activation(body(x) + shortcut(x))`; modules only, as some of the peers cannot see functions."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.activation(self.body(x) + self.shortcut(x))


def residual(inputs: int, width: int, outputs: int, stride: int, bottleneck: bool) -> Residual:
    """Return a basic block of two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1."""
    kernels = (1, 3, 1) if bottleneck else (3, 3)
    widths = [inputs, *(width for _ in kernels[1:]), outputs]
    layers: list[nn.Module] = []
    for position, (kernel, (before, after)) in enumerate(zip(kernels, pairwise(widths), strict=True)):
        strided = position == (1 if bottleneck else 0)
        layers += [conv_norm(before, after, kernel, stride if strided else 1), nn.ReLU()]
    plain = stride == 1 and inputs == outputs
    shortcut = nn.Identity() if plain else conv_norm(inputs, outputs, 1, stride)
    return Residual(nn.Sequential(*layers[:-1]), shortcut, nn.ReLU())


def residual_stages(
    inputs: int, widths: Sequence[int], depths: Sequence[int], bottleneck: bool = False
) -> list[nn.Module]:
    """Return the blocks of a residual network; every stage but the first halves the map."""
    blocks: list[nn.Module] = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        outputs = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if stage and not block else 1
            blocks.append(residual(inputs, width, outputs, stride, bottleneck))
            inputs = outputs
    return blocks


def head(inputs: int, classes: int) -> list[nn.Module]:
    """Return global average pooling and the classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


def resnet20(classes: int = 10, width: int = 16) -> nn.Sequential:
    """Return the ResNet-20 for CIFAR, with 16, 32 and 64 channels."""
    blocks = residual_stages(width, (width, 2 * width, 4 * width), (3, 3, 3))
    return nn.Sequential(conv_norm(3, width, 3), nn.ReLU(), *blocks, *head(4 * width, classes))


def _stem(width: int) -> list[nn.Module]:
    return [conv_norm(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


def resnet18(classes: int = 1000, pooled: bool = True) -> nn.Sequential:
    """Return the ResNet-18 for ImageNet; if not `pooled`, with a 3 x 3 stem that keeps the map, for small images."""
    stem = _stem(64) if pooled else [conv_norm(3, 64, 3), nn.ReLU()]
    return nn.Sequential(*stem, *residual_stages(64, (64, 128, 256, 512), (2, 2, 2, 2)), *head(512, classes))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """Return the ResNet-50 for ImageNet; the stride is on the 3 x 3 convolutions."""
    blocks = residual_stages(64, (64, 128, 256, 512), (3, 4, 6, 3), bottleneck=True)
    return nn.Sequential(*_stem(64), *blocks, *head(2048, classes))


class Inverted(nn.Module):
    """MobileNetV2's block: widen, filter every channel on its own, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        wide = [conv_norm(inputs, hidden, 1), nn.ReLU6()] if widening > 1 else []
        self.body = nn.Sequential(
            *wide, conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), conv_norm(hidden, outputs, 1)
        )
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return x + self.body(x) if self.keeps_shape else self.body(x)


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """Return the MobileNetV2 for ImageNet."""
    inputs, blocks = 32, []
    for widening, outputs, depth, stride in INVERTED:
        for block in range(depth):
            blocks.append(Inverted(inputs, outputs, 1 if block else stride, widening))
            inputs = outputs
    stem = [conv_norm(3, 32, 3, 2), nn.ReLU6()]
    return nn.Sequential(*stem, *blocks, conv_norm(inputs, 1280, 1), nn.ReLU6(), *head(1280, classes))


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in eval mode with normalisation statistics and scales that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.1, 0.1),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return network.eval()
