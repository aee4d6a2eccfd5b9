"""Parts of tiny networks for the table in cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, WIDTH, FILTERS, CLASSES = 2, 3, 4, 3
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def conv2d(filters: int = FILTERS, kernel: Any = 3, inputs: int = WIDTH, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, kernel, **{"padding": "same", **options})


def conv_norm_act(m: Net, h: Tensor) -> Tensor:
    return m.act(m.norm(m.conv(h)))


class Net(nn.Module):
    """stem -> tail (conv -> norm -> act) -> pool -> head -> output."""

    def __init__(
        self,
        conv: nn.Module | None = None,
        act: Callable[[Tensor], Tensor] | None = None,
        *,
        norm: bool = True,
        tail: Callable[[Net, Tensor], Tensor] = conv_norm_act,
        pool: Callable[[Tensor], Tensor] | None = None,
        head: nn.Module | None = None,
        output: Callable[[Tensor, Tensor], Any] = lambda logits, features: logits,
        **extra: nn.Module,
    ) -> None:
        super().__init__()
        self.conv = conv or conv2d()
        dims, filters = len(self.conv.kernel_size), self.conv.out_channels
        self.stem = nn.Sequential(CONVS[dims](CHANNELS, self.conv.in_channels, 3, padding=1), nn.Tanh())
        self.norm = NORMS[dims](filters) if norm else nn.Identity()
        self.act = act or nn.ReLU(inplace=True)
        self.pool = pool or POOLS[dims](1)
        self.head = head or nn.Linear(filters, CLASSES)
        self.tail, self.output = tail, output
        for name, module in extra.items():  # defined last, whenever they run
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        p = self.pool(self.tail(self, self.stem(x)))
        p = p if isinstance(self.head, nn.Conv1d | nn.Conv2d) else p.flatten(1)
        return self.output(self.head(p), p)


def shuffled(z: Tensor) -> Tensor:
    return z.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)


def residual(m: Net, h: Tensor) -> Tensor:
    return m.act(m.norm(m.conv(h)) + h)


def dense(m: Net, h: Tensor) -> Tensor:
    return m.act(m.wide_norm(torch.cat([h, m.conv(h)], 1)))


def inception(m: Net, h: Tensor) -> Tensor:
    return torch.cat([F.relu(m.branch(h)), conv_norm_act(m, h)], 1)


def after_first(m: Net, h: Tensor) -> Tensor:
    return conv_norm_act(m, F.relu(m.first(h)))


def applied_twice(m: Net, h: Tensor) -> Tensor:
    return conv_norm_act(m, F.relu(m.conv(h)))


def in_two_views(m: Net, h: Tensor) -> Tensor:
    return conv_norm_act(m, torch.cat([h, h.flip(3)]))


def squeezed_and_excited(m: Net, h: Tensor) -> Tensor:
    z = m.norm(m.conv(h))
    return m.act(z * m.gate(z.mean((2, 3)))[..., None, None])


def local_sum(z: Tensor) -> Tensor:
    return z + z.roll(1, 3)


def with_first_channel_set(z: Tensor) -> Tensor:
    z[:, 0] = 0.5
    return F.relu(z, inplace=True)


def channel_norm(z: Tensor) -> Tensor:
    return F.relu(F.layer_norm(z.movedim(1, -1), z.shape[1:2]).movedim(-1, 1))


def flat(phi: Tensor, features: Tensor) -> Tensor:
    return phi.flatten(1)


def attention(a: Tensor) -> Tensor:
    return (a.flatten(2) * a.mean(1).flatten(1).softmax(1)[:, None]).sum(2)


def average_and_max(a: Tensor) -> Tensor:
    flat = a.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2)], 1)


def cells(a: Tensor, size: int = 2) -> Tensor:
    return F.adaptive_avg_pool2d(a, size).flatten(1)


def pyramid(a: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return torch.cat([cells(a, size) for size in sizes], 1)


def average_and_deviation(a: Tensor) -> Tensor:
    return torch.cat([a.mean((2, 3)), a.std((2, 3))], 1)


class OnParts(nn.ModuleList):
    """Adds heads, each on its part of the features."""

    def forward(self, p: Tensor) -> Tensor:
        return sum(head(part) for head, part in zip(self, p.chunk(len(self), 1), strict=True))


class Sum(nn.ModuleList):
    def forward(self, p: Tensor) -> Tensor:
        return sum(module(p) for module in self)


class Both(nn.ModuleList):
    def forward(self, p: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(p) for module in self)


class CosineLinear(nn.Linear):
    def forward(self, p: Tensor) -> Tensor:
        return 4 * F.linear(F.normalize(p), F.normalize(self.weight))


class FunctionalLinear(nn.Linear):
    def forward(self, p: Tensor) -> Tensor:
        return 0.5 * F.linear(p, self.weight + 0.1, self.bias) + p @ self.weight.mT


class OfRows(nn.Linear):
    """Sees features (n, 1, k), as `nn.Linear` allows."""

    def forward(self, p: Tensor) -> Tensor:
        return super().forward(p.unsqueeze(1))


class RootMeanSquare(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return p * (p.square().mean(1, keepdim=True) + 1e-3).rsqrt()


class StandardizedConv(nn.Conv2d):
    def forward(self, h: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(h, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def tied(model: Net) -> Net:
    model.first.weight = model.conv.weight
    return model


def hooked(model: Net) -> Net:
    model.conv.register_forward_hook(lambda module, args, z: 2 * z)
    return model


class Swish(torch.autograd.Function):
    """Another backward than the derivative, or the derivative itself."""

    is_right = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @classmethod
    def backward(cls, ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + cls.is_right * x * s * (1 - s))


class RightSwish(Swish):
    is_right = True
