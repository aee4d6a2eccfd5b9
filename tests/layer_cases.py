"""Tiny networks whose every parameter is checked against brute force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flatness.curvature.jacobian.method import JacobianMethod, LayerQuantities
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.recording.recorded_layers import RecordedLayers

CLASSES = 3
Loss = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """conv > norm > act, in place, with a shortcut."""

    def __init__(self, channels: int, act: nn.Module | None = None, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(channels)
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + x


class Excited(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[..., None, None]


class Branches(nn.Module):
    """Two convolutions side by side, neither of which depends on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 2, dilation=2), nn.Conv2d(1, 3, (2, 3), stride=(2, 1), padding=(1, 0))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(branch(x)).amax((2, 3)) for branch in (self.left, self.right)]
        return self.head(torch.cat(parts, 1))


class Twice(nn.Module):
    """The same layers on two views; in both, or one after the other."""

    def __init__(self, is_chained: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.head, self.is_chained = nn.Linear(16, CLASSES), is_chained

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        again = F.relu(self.norm(self.conv(h if self.is_chained else x.flip(3))))
        return self.head(again.flatten(1)) + (0 if self.is_chained else self.head(h.flatten(1)))


class Views(nn.Module):
    """Crops of a sample stand beside each other in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        crops = x.unfold(3, 2, 2).movedim(3, 1).flatten(0, 1)
        return self.head(F.relu(self.conv(crops)).sum((2, 3)).unflatten(0, (len(x), -1)).sum(1))


class Tokens(nn.Module):
    """A transformer on the rows of an image, with a class token, a position embedding and a layer scale."""

    def __init__(self, is_library: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.is_library, self.batch_first = is_library, batch_first
        if is_library:
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=batch_first)
        else:
            self.scale = nn.Parameter(torch.randn(4))
            self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x.squeeze(1))], 1) + self.place
        if self.is_library:
            h = self.layer(h) if self.batch_first else self.layer(h.transpose(0, 1)).transpose(0, 1)
        else:
            q, k, v = self.qkv(self.norm(h)).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + self.scale * self.out(mixed)
        return self.head(h[:, 0])


def chained(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*modules)


def mlp(act: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), norm, act, nn.Linear(4, 4), act, nn.Linear(4, CLASSES))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 4, 4)
    ggn: tuple[str, ...] = ()  # layers behind which the network is curved

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.build().double().eval()
        model(self.data()[0])  # lazy layers
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm | nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.2, 0.3)
        return model

    def data(self, samples: int = 5) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        x = 2 * torch.randn(samples, *self.shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (samples,), generator=generator)


ENCODER = ("embed", "layer.linear1", "layer.linear2", "layer.self_attn.out_proj")
CASES = [
    Case(
        "LeNet",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES)),
        ),
    ),
    Case("fully connected", lambda: mlp(nn.ReLU(), nn.BatchNorm1d(4))),
    Case(
        "VGG-like",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, CLASSES)),
        ),
    ),
    Case(
        "residual, max-pool, groups, PReLU",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1, bias=False), Block(2, groups=2), nn.MaxPool2d(2), Block(2, nn.PReLU(2))),
            *(nn.Flatten(), nn.Linear(8, CLASSES)),
        ),
    ),
    Case(
        "1d",
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3, stride=2, padding=2, padding_mode="circular"), nn.ReLU()),
            *(nn.Conv1d(4, 4, 2, groups=2, dilation=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()),
            nn.LazyLinear(CLASSES),
        ),
        (2, 8),
    ),
    Case(
        "3d",
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 2, 2, padding=1), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2)),
            *(nn.Conv3d(2, 2, (1, 2, 1), padding_mode="replicate", padding=(0, 1, 0)), nn.ReLU(), nn.Flatten()),
            nn.LazyLinear(CLASSES),
        ),
        (1, 3, 3, 2),
    ),
    Case(
        "reflected, 1x1, same",
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(2, 2, 1, stride=2),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(2, 2, 2, padding="same"),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        ),
    ),
    Case("branches", Branches),
    Case("two views", lambda: Twice(False)),
    Case("crops in the batch", Views),
    Case(
        "pooled",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        ),
    ),
    Case(
        "linear at positions",
        lambda: nn.Sequential(
            nn.Flatten(1, 2), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, CLASSES)
        ),
    ),
    Case("curved before, not behind", lambda: mlp(nn.ReLU(), nn.SiLU()), ggn=("1",)),
    # Curved behind: the Gauss-Newton part.
    Case(
        "SiLU",
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, CLASSES)
        ),
        ggn=("0", "3"),
    ),
    Case("LayerNorm", lambda: mlp(nn.ReLU(), nn.LayerNorm(4)), ggn=("1",)),
    Case(
        "GroupNorm",
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)),
        ggn=("0",),
    ),
    Case(
        "squeeze and excitation",
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), Excited(2), nn.Flatten(), nn.Linear(8, CLASSES)),
        ggn=("0", "1.gate.0", "1.gate.2"),
    ),
    Case("chained with itself", lambda: Twice(True), ggn=("conv",)),
    Case("attention", lambda: Tokens(False), ggn=("embed", "qkv")),
    Case(
        "encoder layer",
        lambda: Tokens(True),
        ggn=("embed", "layer.linear1", "layer.linear2", "layer.self_attn.out_proj"),
    ),
    Case(
        "encoder layer, positions first",
        lambda: Tokens(True, False),
        ggn=("embed", "layer.linear1", "layer.linear2", "layer.self_attn.out_proj"),
    ),
]


def recorded(model: nn.Module, x: Tensor, y: Any, loss: Loss = F.cross_entropy, layers: Any = "all") -> RecordedLayers:
    """One pass without gradients."""
    with LayersRecorder(model, layers) as recorder, torch.no_grad():
        return recorder.take_pass(loss(model(x), y))


def measured(
    model: nn.Module, x: Tensor, y: Any, loss: Loss = F.cross_entropy, layers: Any = "all", **options: Any
) -> LayerQuantities:
    """The quantities of one pass."""
    return JacobianMethod(**options).quantities(recorded(model, x, y, loss, layers))


def gauss_newton(
    model: nn.Module, name: str, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
) -> tuple[Tensor, Tensor]:
    """Trace and relative flatness of `J^T B J` of each sample, from the dense Jacobian: independent of the package."""
    parameter, traces, relative = model.get_parameter(name).detach(), [], []
    for one, target in zip(x.split(1), y.split(1), strict=True):

        def logits(free: Tensor, one: Tensor = one) -> Tensor:
            return torch.func.functional_call(model, {name: free}, (one,)).flatten()

        phi = logits(parameter)
        curvature = torch.autograd.functional.hessian(lambda v, t=target: F.cross_entropy(v.unsqueeze(0), t), phi)
        jacobian = torch.autograd.functional.jacobian(logits, parameter).reshape(len(phi), len(parameter), -1)
        rows = parameter.reshape(len(parameter), -1)
        traces.append(torch.einsum("ckd,ce,ekd->", jacobian, curvature, jacobian))
        relative.append(torch.einsum("kl,ckd,ce,eld->", rows @ rows.T, jacobian, curvature, jacobian))
    return torch.stack(traces), torch.stack(relative)


def whole_trace(model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """Trace of the full Hessian of each sample in all parameters at once."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    sizes, shapes = [value.numel() for value in values.values()], [value.shape for value in values.values()]
    traces = []
    for one, target in zip(x.split(1), y.split(1), strict=True):

        def step(flat: Tensor, one: Tensor = one, target: Tensor = target) -> Tensor:
            parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
            return loss(torch.func.functional_call(model, dict(zip(values, parts, strict=True)), (one,)), target)

        flat = torch.cat([value.flatten() for value in values.values()])
        traces.append(torch.autograd.functional.hessian(step, flat).diagonal().sum())
    return torch.stack(traces)
