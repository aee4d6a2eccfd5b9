"""One table of tiny networks: every tail and every head that must be exact, every tail that must be refused.

All in float64 with a handful of samples and filters, so that the full Hessian of the last convolution fits
the oracle. Batch norms have random affine parameters and running statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from networks import (
    CHANNELS,
    CLASSES,
    FILTERS,
    NORMS,
    Both,
    CosineLinear,
    FunctionalLinear,
    Net,
    OfRows,
    OnParts,
    RootMeanSquare,
    StandardizedConv,
    Sum,
    after_first,
    applied_twice,
    attention,
    average_and_deviation,
    average_and_max,
    cells,
    channel_norm,
    conv2d,
    conv_norm_act,
    dense,
    flat,
    frozen,
    hooked,
    in_two_views,
    inception,
    local_sum,
    pyramid,
    residual,
    shuffled,
    squeezed_and_excited,
    tied,
    with_first_channel_set,
)
from torch import Tensor, nn

MAP = (5, CHANNELS, 5, 4)


@dataclass(frozen=True)
class Case:
    """A network, the layers that must be found in it, and whether the closed form covers it."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...] = MAP
    layer: str = "conv"
    classifier: str | None = "head"
    reason: str | None = None  # what the error says about an unsupported tail, as a regular expression

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The network in float64 and in training mode, with the same weights at every call."""
        torch.manual_seed(sum(map(ord, self.name)))
        model = copy.deepcopy(self.build()).double()  # the table shares its activations
        for module in model.modules():
            if isinstance(module, tuple(NORMS.values())) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.2, 0.3)
        if self.classifier is not None and hasattr(head := model.get_submodule(self.classifier), "weight"):
            nn.init.normal_(head.weight, 0, 3)
        return model

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all samples."""
        generator = torch.Generator().manual_seed(7)
        normal = partial(torch.randn, dtype=torch.float64, generator=generator)
        level = normal(self.input_shape[:2]).reshape(*self.input_shape[:2], *[1] * (len(self.input_shape) - 2))
        return 2 * level + normal(self.input_shape), torch.randint(CLASSES, self.input_shape[:1], generator=generator)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "functional relu": F.relu,
    "relu6": nn.ReLU6(inplace=True),
    "leaky relu": nn.LeakyReLU(0.1, inplace=True),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "elu": nn.ELU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "tanh": torch.tanh,
    "squared relu": lambda z: F.relu(z).square(),
    "identity": nn.Identity(),
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "no bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "stride and no padding": {"stride": (1, 2), "padding": 0},
    "dilation": {"dilation": 2, "padding": 2},
    "dilation same": {"dilation": 2, "kernel": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular same": {"padding_mode": "circular", "kernel": (2, 3)},
    "groups": {"inputs": 4, "groups": 2},
    "depthwise": {"inputs": 4, "groups": 4},
    "depthwise multiplier": {"inputs": 2, "groups": 2, "padding": 1, "padding_mode": "reflect"},
    "1x3": {"kernel": (1, 3)},
    "1x1": {"kernel": 1},
    "1x1 stride": {"kernel": 1, "stride": 2, "padding": 0},
    "even kernel": {"kernel": 2, "padding": 1},
    "even kernel same": {"kernel": (4, 2)},
    "more padding than kernel": {"kernel": 1, "padding": 1, "stride": 2},
}
WIRINGS: dict[str, Callable[[], nn.Module]] = {
    "saturated relu6": lambda: Net(act=lambda z: F.relu6(9 * z) / 9),
    "saturated hardswish": lambda: Net(act=lambda z: F.hardswish(5 * z) / 5),
    "prelu": lambda: Net(act=nn.PReLU(FILTERS), norm=False),
    "written by hand": lambda: Net(act=lambda z: torch.where(z > 0, z, 0.1 * z) + z * torch.sigmoid(z)),
    "one channel assigned": lambda: Net(act=with_first_channel_set),
    # Residual wiring: what is added does not depend on the convolution.
    "residual": lambda: Net(conv2d(3), tail=residual),
    "residual silu": lambda: Net(conv2d(3), nn.SiLU(), tail=residual),
    "residual in place": lambda: Net(conv2d(3), tail=lambda m, h: m.act(m.conv(h).add_(h))),
    "residual after activation": lambda: Net(conv2d(3), tail=lambda m, h: h + conv_norm_act(m, h)),
    "scaled residual": lambda: Net(conv2d(3), nn.GELU(), tail=lambda m, h: m.act(0.3 * m.conv(h) + h)),
    "projected shortcut": lambda: Net(tail=lambda m, h: m.act(m.skip(h) + m.conv(h)), skip=conv2d(kernel=1)),
    "fixed window": lambda: Net(act=lambda z: F.silu(z) * torch.linspace(0.5, 2, 4).to(z)),
    # Which channel of the convolution feeds which feature.
    "dense block": lambda: Net(tail=dense, wide_norm=nn.BatchNorm2d(7), head=nn.Linear(7, 3)),
    "dense block silu": lambda: Net(None, nn.SiLU(), tail=dense, wide_norm=nn.BatchNorm2d(7), head=nn.Linear(7, 3)),
    "inception": lambda: Net(tail=inception, branch=conv2d(2, 1), head=nn.Linear(6, 3)),
    "channel shuffle": lambda: Net(act=lambda z: F.relu(shuffled(z))),
    "channel shuffle and cat": lambda: Net(
        conv2d(2),
        tail=lambda m, h: shuffled(torch.cat([conv_norm_act(m, h), h[:, :2]], 1)),
        head=nn.Linear(4, 3),
    ),
    # Pooling.
    "functional mean": lambda: Net(pool=lambda a: a.mean((2, 3))),
    "functional mean silu": lambda: Net(act=F.silu, pool=lambda a: a.flatten(2).mean(-1)),
    "average pool of the whole map": lambda: Net(pool=nn.AvgPool2d((5, 4))),
    "global max": lambda: Net(pool=nn.AdaptiveMaxPool2d(1)),
    "amax silu": lambda: Net(act=nn.SiLU(), pool=lambda a: a.amax((2, 3))),
    "max pool": lambda: Net(pool=nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))),
    "max pool silu": lambda: Net(act=nn.SiLU(), pool=lambda a: F.max_pool2d(a, 3, 1).mean((2, 3))),
    "average pool": lambda: Net(pool=nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))),
    "average pool silu": lambda: Net(act=nn.SiLU(), pool=lambda a: F.avg_pool2d(a, 3, 1).mean((2, 3))),
    "relu of average pool": lambda: Net(act=lambda z: F.relu(F.avg_pool2d(z, 2))),
    "top-k pool": lambda: Net(pool=lambda a: a.flatten(2).topk(5).values.mean(-1)),
    "learned depthwise pool": lambda: Net(act=nn.SiLU(), pool=nn.Conv2d(4, 4, (5, 4), groups=4)),
    "upsampled": lambda: Net(act=lambda z: F.relu(F.interpolate(z, scale_factor=2, mode="bilinear"))),
    "norm after pool": lambda: Net(pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))),
    "relu after pool": lambda: Net(act=F.leaky_relu, pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU())),
    "dropout": lambda: Net(pool=nn.Sequential(nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5))),
    # Classifiers and outputs.
    "1x1 convolution as classifier": lambda: Net(head=nn.Conv2d(4, 3, 1), output=lambda phi, p: phi.flatten(1)),
    "classifier without bias": lambda: Net(act=nn.SiLU(), head=nn.Linear(FILTERS, CLASSES, bias=False)),
    "log softmax": lambda: Net(output=lambda phi, p: phi.log_softmax(1)),
    "dict output": lambda: Net(output=lambda phi, p: {"features": p, "logits": phi}),
    "tuple output": lambda: Net(output=lambda phi, p: (phi, p)),
    "object output": lambda: Net(output=lambda phi, p: SimpleNamespace(logits=phi, features=p)),
    # Finding the layers.
    "defined last, run first": lambda: Net(conv2d(inputs=3), tail=after_first, first=conv2d(3)),
    "unused layers": lambda: Net(old_conv=conv2d(), old_head=nn.Linear(FILTERS, CLASSES)),
    "frozen convolution": lambda: frozen(Net(), "conv.weight", "conv.bias"),
    "frozen rest": lambda: frozen(Net(act=nn.SiLU()), "head.weight", "norm.weight", "stem.0.weight"),
}
MEAN = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
# What lies between the pooled features and the loss is a function of its own, whatever it is.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "hidden layer": lambda: Net(head=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))),
    "hidden layer behind silu": lambda: Net(
        act=nn.SiLU(), head=nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3))
    ),
    "curved hidden layer": lambda: Net(head=nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))),
    "curved hidden layer behind silu": lambda: Net(
        act=F.silu, head=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    ),
    "two hidden layers and dropout": lambda: Net(
        head=nn.Sequential(
            *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Hardswish(), nn.Dropout(0.5)),
            *(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 3)),
        )
    ),
    "layer norm": lambda: Net(pool=nn.Sequential(*MEAN, nn.LayerNorm(4))),
    "layer norm and gelu": lambda: Net(pool=nn.Sequential(*MEAN, nn.LayerNorm(4), nn.GELU())),
    "layer norm behind silu": lambda: Net(act=F.silu, pool=nn.Sequential(*MEAN, nn.LayerNorm(4))),
    "root mean square norm": lambda: Net(head=nn.Sequential(RootMeanSquare(), nn.Linear(4, 3))),
    "group norm after pooling": lambda: Net(pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 4))),
    "curved after the pool": lambda: Net(pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.SiLU())),
    "generalized mean": lambda: Net(pool=lambda a: (a + 0.1).pow(3).mean((2, 3)).pow(1 / 3)),
    "gated features": lambda: Net(pool=lambda a: (p := a.mean((2, 3))) * p.mean(1, keepdim=True).sigmoid()),
    "softmax over features": lambda: Net(pool=lambda a: a.mean((2, 3)).softmax(1)),
    "larger of two features": lambda: Net(
        head=nn.Linear(2, 3), pool=lambda a: (p := a.mean((2, 3)))[:, :2].maximum(p[:, 2:])
    ),
    "cosine classifier": lambda: Net(head=CosineLinear(4, 3)),
    "normalized behind silu": lambda: Net(act=F.silu, head=CosineLinear(4, 3)),
    "functional classifier": lambda: Net(head=FunctionalLinear(4, 3)),
    "head on positions": lambda: Net(head=nn.Conv1d(4, 3, 1), pool=lambda a: a.flatten(2).mean(2, True), output=flat),
    "classifier of rows": lambda: Net(head=OfRows(4, 3), output=flat),
    "temperature": lambda: Net(output=lambda phi, p: phi / 2),
    "learned temperature": lambda: Net(output=lambda phi, p: phi * p.mean(1, keepdim=True).exp()),
    "soft cap": lambda: Net(output=lambda phi, p: 3 * torch.tanh(phi / 3)),
    "soft cap behind silu": lambda: Net(act=F.silu, output=lambda phi, p: 3 * torch.tanh(phi / 3)),
    "relu of the logits": lambda: Net(output=lambda phi, p: F.relu(phi)),
    "softmax": lambda: Net(output=lambda phi, p: phi.softmax(1)),
    "some of the logits": lambda: Net(head=nn.Linear(4, 5), output=lambda phi, p: phi[:, :3]),
    "prior added to the logits": lambda: Net(output=lambda phi, p: phi + torch.tensor([1.0, 0, -1]).to(phi)),
    "around the classifier": lambda: Net(conv2d(3), output=lambda phi, p: phi + p),
    "sum of two classifiers": lambda: Net(head=Sum([nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(4, 3))])),
    "mean of two classifiers": lambda: Net(head=Sum([nn.Linear(4, 3), nn.Linear(4, 3)]), output=lambda phi, p: phi / 2),
    "negative distances": lambda: Net(output=lambda phi, p: -(phi[:, None] - torch.eye(3).to(phi)).square().sum(2)),
    "output changed by a hook": lambda: hooked(Net()),
}
# A filter feeds several features.
SEVERAL: dict[str, Callable[[], nn.Module]] = {
    "average and max": lambda: Net(pool=average_and_max, head=nn.Linear(8, 3)),
    "average and max silu": lambda: Net(None, F.silu, pool=average_and_max, head=nn.Linear(8, 3)),
    "average and twice the average": lambda: Net(
        pool=lambda a: (p := a.mean((2, 3))).repeat_interleave(2, 1) * p.new_tensor([1, 2]).repeat(4),
        head=nn.Linear(8, 3),
    ),
    "2 x 2 cells": lambda: Net(pool=cells, head=nn.Linear(16, 3)),
    "average and cells silu": lambda: Net(None, F.silu, pool=partial(pyramid, sizes=(1, 2)), head=nn.Linear(20, 3)),
    "pyramid": lambda: Net(pool=partial(pyramid, sizes=(1, 2, 4)), head=nn.Linear(84, 3)),
    "flatten": lambda: Net(pool=nn.Flatten(), head=nn.Linear(80, 3)),
    "flatten behind gelu": lambda: Net(None, F.gelu, pool=nn.Flatten(), head=nn.Linear(80, 3)),
    "both signs of a channel": lambda: Net(act=lambda z: F.relu(torch.cat([z, -z], 1)), head=nn.Linear(8, 3)),
    "shuffled cells": lambda: Net(act=lambda z: F.relu(shuffled(z)), pool=average_and_max, head=nn.Linear(8, 3)),
    "dense block of two poolings": lambda: Net(
        None, nn.SiLU(), tail=dense, wide_norm=nn.BatchNorm2d(7), pool=average_and_max, head=nn.Linear(14, 3)
    ),
    "two features for some filters": lambda: Net(
        pool=lambda a: torch.cat([a.mean((2, 3)), a[:, 1:3].amax((2, 3))], 1), head=nn.Linear(6, 3)
    ),
    "a head for each pooling": lambda: Net(
        pool=average_and_max, head=OnParts([nn.Linear(4, 3), nn.Linear(4, 3)]), output=lambda phi, p: phi / 2
    ),
    "hidden layer on cells": lambda: Net(pool=cells, head=nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))),
    "curved hidden layer on two poolings": lambda: Net(
        None, F.silu, pool=average_and_max, head=nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3))
    ),
    "layer norm on two poolings": lambda: Net(
        pool=average_and_max, head=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    ),
    "squared distances of two poolings": lambda: Net(
        pool=average_and_max,
        head=nn.Linear(8, 3),
        output=lambda phi, p: -(phi[:, None] - torch.eye(3).to(phi)).square().sum(2),
    ),
    "positions of one filter": lambda: Net(
        conv2d(1), pool=lambda a: a.view(len(a), -1).mean(1, keepdim=True), head=nn.Linear(1, 3)
    ),
    "many positions of one filter": lambda: Net(
        conv2d(1),
        act=lambda z: F.relu(F.interpolate(z, scale_factor=2)),
        pool=lambda a: a.view(len(a), -1).mean(1, keepdim=True),
        head=nn.Linear(1, 3),
    ),
    "two poolings of groups": lambda: Net(conv2d(inputs=4, groups=2), pool=average_and_max, head=nn.Linear(8, 3)),
    "cells of a depthwise convolution": lambda: Net(
        conv2d(inputs=4, groups=4), F.silu, pool=cells, head=nn.Linear(16, 3)
    ),
}
SUPPORTED = [
    *(Case(name, partial(Net, act=act)) for name, act in ACTIVATIONS.items()),
    *(Case(f"{name} without norm", partial(Net, act=act, norm=False)) for name, act in ACTIVATIONS.items()),
    *(Case(name, lambda o=options: Net(conv2d(**o))) for name, options in CONVOLUTIONS.items()),
    *(Case(f"{name} silu", lambda o=options: Net(conv2d(**o), F.silu)) for name, options in CONVOLUTIONS.items()),
    *(Case(name, build) for name, build in WIRINGS.items()),
    *(Case(name, build, classifier=None) for name, build in (HEADS | SEVERAL).items()),
    Case(
        "two poolings of conv1d",
        lambda: Net(nn.Conv1d(4, 4, 3, groups=2), F.silu, pool=average_and_max, head=nn.Linear(8, 3)),
        (5, CHANNELS, 6),
    ),
    Case(
        "two poolings of conv3d",
        lambda: Net(nn.Conv3d(2, 3, 2, padding="same"), pool=average_and_max, head=nn.Linear(6, 3)),
        (4, CHANNELS, 3, 3, 2),
    ),
    Case("conv1d", lambda: Net(nn.Conv1d(3, 4, 4, padding=2)), (5, CHANNELS, 6)),
    Case("conv1d groups silu", lambda: Net(nn.Conv1d(4, 4, 3, stride=2, groups=2), F.silu), (5, CHANNELS, 7)),
    Case("conv3d", lambda: Net(nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 1, 0))), (4, CHANNELS, 3, 4, 2)),
    Case("conv3d same silu", lambda: Net(nn.Conv3d(2, 3, 2, padding="same"), F.silu), (4, CHANNELS, 3, 3, 2)),
    Case("conv is classifier", lambda: Net(conv2d(3), norm=False, head=nn.Flatten()), classifier=None),
    Case("conv is classifier silu", lambda: Net(conv2d(3), F.silu, head=nn.Flatten()), classifier=None),
    Case("auxiliary output", lambda: Net(head=Both([nn.Linear(4, 3), nn.Linear(4, 3)])), classifier="head.0"),
    Case("nested", lambda: nn.Sequential(nn.Sequential(Net())), layer="0.0.conv", classifier="0.0.head"),
]

UNSUPPORTED_TAILS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    # After the convolution.
    "squeeze and excitation": (
        "mixes",
        lambda: Net(tail=squeezed_and_excited, gate=nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())),
    ),
    "hard gate": (
        "mixes",
        lambda: Net(tail=squeezed_and_excited, gate=nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid())),
    ),
    "group norm": ("native_group_norm", lambda: Net(act=nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU()))),
    "instance norm": ("mixes samples", lambda: Net(act=nn.Sequential(nn.InstanceNorm2d(4), nn.ReLU()))),
    "batch statistics": (
        "mixes samples",
        lambda: Net(act=nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())),
    ),
    "batch mean": ("sub", lambda: Net(act=lambda z: F.relu(z - z.mean((0, 2, 3), keepdim=True)))),
    "channels gate themselves": (
        "positions",
        lambda: Net(act=lambda z: z * z.mean((2, 3), keepdim=True).sigmoid()),
    ),
    "larger of two channels": (
        "max",
        lambda: Net(act=lambda z: z[:, :2].maximum(z[:, 2:]), head=nn.Linear(2, 3)),
    ),
    "number read out": ("item", lambda: Net(act=lambda z: F.relu(z / z.abs().max().item()))),
    "glu": ("glu", lambda: Net(act=nn.GLU(1), head=nn.Linear(2, 3))),
    "product of channels": ("mul", lambda: Net(act=lambda z: z[:, :2] * z[:, 2:], head=nn.Linear(2, 3))),
    "softmax over channels": ("softmax", lambda: Net(act=nn.Softmax(1))),
    "average pool before silu": ("positions", lambda: Net(act=nn.Sequential(nn.AvgPool2d(2), nn.SiLU()))),
    "local sum before gelu": ("positions", lambda: Net(act=lambda z: F.gelu(local_sum(z)))),
    "two views of a sample": (
        "couples the samples",
        lambda: Net(tail=in_two_views, output=lambda phi, p: phi.unflatten(0, (2, -1)).mean(0)),
    ),
    # Pooling.
    "flattened large map": (
        "up to 32 features for each filter.* there are 80 and 320",
        lambda: Net(act=lambda z: F.relu(F.interpolate(z, scale_factor=2)), pool=nn.Flatten(), head=nn.Linear(320, 3)),
    ),
    "attention pooling": ("mixes", lambda: Net(pool=attention)),
    "average and deviation": ("positions", lambda: Net(pool=average_and_deviation, head=nn.Linear(8, 3))),
    "average and deviation silu": (
        "positions",
        lambda: Net(None, F.silu, pool=average_and_deviation, head=nn.Linear(8, 3)),
    ),
    "average and variance": (
        "positions",
        lambda: Net(pool=lambda a: torch.cat([a.mean((2, 3)), a.var((2, 3))], 1), head=nn.Linear(8, 3)),
    ),
    "a deviation and its negative": (  # the sum of both has no curvature
        "positions",
        lambda: Net(pool=lambda a: torch.cat([p := a.std((2, 3)), a.mean((2, 3)) - p], 1), head=nn.Linear(8, 3)),
    ),
    "average and neighbour's maximum": (
        "`add`, mixes",
        lambda: Net(
            pool=lambda a: torch.cat([m := a.amax((2, 3)), a.mean((2, 3)) + m.roll(1, 1)], 1), head=nn.Linear(8, 3)
        ),
    ),
    "cells mixed by a convolution": (
        "`convolution`, mixes",
        lambda: Net(pool=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 4, 2)), head=nn.Linear(4, 3)),
    ),
    "curved after the cells": (
        "positions",
        lambda: Net(pool=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.SiLU()), head=nn.Linear(16, 3)),
    ),
    "log-sum-exp pooling": ("positions", lambda: Net(pool=lambda a: a.logsumexp((2, 3)))),
    "layer norm before pooling": ("permute|native_layer_norm", lambda: Net(act=channel_norm)),
    # The convolution itself.
    "called twice": ("convolution", lambda: Net(conv2d(inputs=4), tail=applied_twice)),
    "shared weight": (
        "shared",
        lambda: tied(Net(conv2d(inputs=4), tail=after_first, first=conv2d(inputs=4))),
    ),
    "standardized weight": ("convolution", lambda: Net(StandardizedConv(3, 4, 3))),
    "transposed convolution": (
        "convolution",
        lambda: Net(act=nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.ReLU())),
    ),
    "no convolution": ("none did", lambda: nn.Sequential(nn.Flatten(), nn.Linear(40, 3))),
}
UNSUPPORTED = [Case(name, build, classifier=None, reason=reason) for name, (reason, build) in UNSUPPORTED_TAILS.items()]
