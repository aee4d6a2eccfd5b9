"""The networks of the experiments, small enough for one core; all take images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_flatness.examples.digits import ResidualBlock


class PreActivated(nn.Module):
    """`x + f(x)`, where `f` normalises and activates before each of its two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        unit = [(nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, channels)) for _ in range(2)]
        self.body = nn.Sequential(*(layer for layers in unit for layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of shape (n, channels, height, width) to one of the same shape."""
        return x + self.body(x)


class Inverted(nn.Module):
    """MobileNetV2's block: widen twofold, filter each channel on its own, narrow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            *_normed(channels, wide, 1), *_normed(wide, wide, 3, groups=wide), *_normed(wide, channels, 1)[:2]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of shape (n, channels, height, width) to one of the same shape."""
        return x + self.body(x)


class Dense(nn.Module):
    """DenseNet's block: each layer sees all maps before it; a 1 x 1 convolution narrows them."""

    def __init__(self, channels: int, layers: int = 2) -> None:
        super().__init__()
        growth = channels // 2
        self.layers = nn.ModuleList(nn.Sequential(*_normed(channels + i * growth, growth)) for i in range(layers))
        self.narrow = nn.Sequential(*_normed(channels + layers * growth, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of shape (n, channels, height, width) to one of the same shape."""
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return self.narrow(x)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _unnormalised(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def _normed(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU()]


_BLOCKS: dict[str, Callable[[int], list[nn.Module]]] = {
    "residual": lambda width: [ResidualBlock(width)],
    "plain": lambda width: _normed(width, width),
    "unnormalised": lambda width: [_unnormalised(width, width), nn.ReLU()],
    "mobile": lambda width: [Inverted(width)],
    "dense": lambda width: [Dense(width)],
    "preactivated": lambda width: [PreActivated(width)],
    "vgg": lambda width: [*_normed(width, width), nn.MaxPool2d(2, ceil_mode=True)],
}
_LAST: dict[str, Callable[[int], list[nn.Module]]] = {
    "mobile": lambda width: _normed(width, width, 1),
    "preactivated": lambda width: [nn.BatchNorm2d(width), nn.ReLU()],
}
POOLED = tuple(_BLOCKS)
"""Networks that end in a global average pooling and a linear classifier."""


def network(
    name: str, shape: tuple[int, int, int], classes: int, width: int = 8, depth: int = 1, pooled: bool = True
) -> nn.Module:
    """Return an untrained network.

    Args:
        name: one of `POOLED`, or `logistic`, `mlp`, `mlp_norm` and `lenet`.
        shape: channels, height and width of an image; from 16 pixels on the first convolution has stride 2.
        classes: number of classes.
        width: channels of the convolutions, or units of a hidden layer.
        depth: number of blocks, or of hidden layers.
        pooled: whether the classifier of a network in `POOLED` sees the mean over the positions, or all of them.
    """
    channels, height, breadth = shape
    if name in _BLOCKS:
        stride = 2 if height >= 16 else 1
        stem = _normed(channels, width, 3, stride)
        if name == "unnormalised":
            stem = [_unnormalised(channels, width, stride), nn.ReLU()]
        blocks = [layer for _ in range(depth) for layer in _BLOCKS[name](width)]
        positions = 1 if pooled else math.ceil(height / stride) * math.ceil(breadth / stride)
        tail = [nn.Flatten(), nn.Linear(width * positions, classes)]
        if pooled:
            tail.insert(0, nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*stem, *blocks, *_LAST.get(name, lambda _: [])(width), *tail)
    if name == "lenet":
        return _lenet(shape, classes)
    layers, inputs = [nn.Flatten()], channels * height * breadth
    for _ in range(0 if name == "logistic" else depth):
        norm = [nn.BatchNorm1d(width)] if name == "mlp_norm" else []
        layers += [nn.Linear(inputs, width), *norm, nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _lenet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return LeNet-5 with ReLU and max-pooling; images below 28 pixels skip the padding-free second stage's pooling."""
    channels, height, breadth = shape
    small = height < 28
    body = nn.Sequential(
        nn.Conv2d(channels, 6, 3 if small else 5, padding=1 if small else 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3 if small else 5),
        nn.ReLU(),
        nn.Identity() if small else nn.MaxPool2d(2),
        nn.Flatten(),
    )
    inputs = body(torch.zeros(1, channels, height, breadth)).shape[1]
    hidden = [nn.Linear(inputs, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return nn.Sequential(body, *hidden, nn.Linear(84, classes))
