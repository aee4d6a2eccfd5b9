"""Random heads and losses for the fuzz: what a user can put between the pooled features and the number of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_tails import Network, Tail, tails
from hypothesis import strategies as st
from networks import CosineLinear, RootMeanSquare
from torch import Tensor, nn

WIDTH = 5  # of hidden layers


class Scaled(nn.Linear):
    def forward(self, p: Tensor) -> Tensor:
        return super().forward(p) / 2.5


class Capped(nn.Linear):
    def forward(self, p: Tensor) -> Tensor:
        return 3 * (super().forward(p) / 3).tanh()


class Averaged(nn.Module):
    def __init__(self, k: int, c: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(k, c), nn.Linear(k, c)

    def forward(self, p: Tensor) -> Tensor:
        return (self.first(p) + self.second(p)) / 2


class Prototypes(nn.Module):
    def __init__(self, k: int, c: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(c, k))

    def forward(self, p: Tensor) -> Tensor:
        return -(p[:, None] - self.points).square().sum(2)


def hidden(act: type[nn.Module], *norms: type[nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda k, c: nn.Sequential(
        nn.Linear(k, WIDTH), *(norm(WIDTH) for norm in norms), act(), nn.Dropout(0.5), nn.Linear(WIDTH, c)
    )


def before(make: Callable[[int], nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda k, c: nn.Sequential(make(k), nn.Linear(k, c))


# (features, classes) -> head
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "no bias": lambda k, c: nn.Linear(k, c, bias=False),
    "temperature": Scaled,
    "soft cap": Capped,
    "hidden relu": hidden(nn.ReLU),
    "hidden relu6 behind a norm": hidden(nn.ReLU6, nn.BatchNorm1d),
    "hidden gelu": hidden(nn.GELU),
    "hidden hardswish": hidden(nn.Hardswish),
    "hidden silu behind a norm": hidden(nn.SiLU, nn.BatchNorm1d),
    "hidden tanh behind layer norm": hidden(nn.Tanh, nn.LayerNorm),
    "layer norm": before(nn.LayerNorm),
    "root mean square": before(lambda k: RootMeanSquare()),
    "silu of the features": before(lambda k: nn.SiLU()),
    "dropout": before(lambda k: nn.Dropout(0.3)),
    "cosine": CosineLinear,
    "averaged": Averaged,
    "prototypes": Prototypes,
    "log-softmax": lambda k, c: nn.Sequential(nn.Linear(k, c), nn.LogSoftmax(1)),
    "softmax": lambda k, c: nn.Sequential(nn.Linear(k, c), nn.Softmax(1)),
    "relu": lambda k, c: nn.Sequential(nn.Linear(k, c), nn.LeakyReLU(0.2)),
}


def one_hot(y: Tensor, phi: Tensor) -> Tensor:
    return F.one_hot(y, phi.shape[1]).to(phi)


def multi_hot(y: Tensor, phi: Tensor) -> Tensor:
    return ((y[:, None] + torch.arange(phi.shape[1])) % 3 > 0).to(phi)


def weights(phi: Tensor) -> Tensor:
    return torch.arange(phi.shape[1]).to(phi) + 0.5


def ignored(y: Tensor) -> Tensor:
    """The first sample has no label, unless it is alone."""
    return y.where(torch.arange(len(y)) > 0, -100) if len(y) > 1 else y


def focal(phi: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(phi, y, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def poly(phi: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(phi, y, reduction="none")
    return (each + 1 - (-each).exp()).mean()


def distilled(phi: Tensor, y: Tensor) -> Tensor:
    teacher = (2 * one_hot(y, phi)).softmax(1)
    soft = F.kl_div((phi / 2).log_softmax(1), teacher, reduction="batchmean")
    return F.cross_entropy(phi, y) + 4 * soft


def cross_entropy(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda phi, y: F.cross_entropy(phi, y, **options)


def contrastive(phi: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(phi)
    return F.cross_entropy(4 * z @ z.mT, torch.arange(len(y)))


# (logits, class indices) -> the number of the step.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "sum": cross_entropy(reduction="sum"),
    "smoothed": cross_entropy(label_smoothing=0.2),
    "class weights": lambda phi, y: F.cross_entropy(phi, y, weights(phi)),
    "class weights, mean of samples": lambda phi, y: F.cross_entropy(phi, y, weights(phi), reduction="none").mean(),
    "weighted, smoothed": lambda phi, y: F.cross_entropy(phi, y, weights(phi), label_smoothing=0.3),
    "ignored": lambda phi, y: F.cross_entropy(phi, ignored(y)),
    "soft": lambda phi, y: F.cross_entropy(phi, (one_hot(y, phi) + 0.3) / (1 + 0.3 * phi.shape[1])),
    "temperature": lambda phi, y: F.cross_entropy(phi / 0.7, y),
    "adjusted": lambda phi, y: F.cross_entropy(phi + weights(phi).log(), y),
    "margin": lambda phi, y: F.cross_entropy(phi - 0.5 * one_hot(y, phi), y),
    "scaled": lambda phi, y: 0.3 * F.cross_entropy(phi, y),
    "binary": lambda phi, y: F.binary_cross_entropy_with_logits(phi, multi_hot(y, phi)),
    "binary, weighted": lambda phi, y: F.binary_cross_entropy_with_logits(
        phi, multi_hot(y, phi), weights(phi), pos_weight=weights(phi).flip(0)
    ),
    "binary, of rows": lambda phi, y: (
        F.binary_cross_entropy_with_logits(phi, multi_hot(y, phi), reduction="none").sum(1).mean()
    ),
    "focal": focal,
    "poly": poly,
    "squared error": lambda phi, y: F.mse_loss(phi, one_hot(y, phi)),
    "squared error of probabilities": lambda phi, y: F.mse_loss(phi.softmax(1), one_hot(y, phi)),
    "squared hinge": lambda phi, y: (1 - (2 * one_hot(y, phi) - 1) * phi).clamp_min(0).square().mean(),
    "distillation": distilled,
    "penalty": lambda phi, y: F.cross_entropy(phi, y) + 0.05 * phi.square().sum(1).mean(),
}
# Samples that see each other: refused, but for a batch of one.
COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": contrastive,
    "square of the mean": lambda phi, y: F.cross_entropy(phi, y).square(),
    "centred": lambda phi, y: F.cross_entropy(phi - phi.mean(0), y),
}
SUMS = {"sum"}  # whose value is the contribution of the sample


@dataclass(frozen=True)
class Task:
    """A tail, a head and a loss, in float64, and two batches."""

    tail: Tail
    head: str
    loss: str

    @property
    def plain(self) -> bool:
        """Whether it must be measured: the direction of a single feature is its sign, which has no derivative."""
        is_sign = self.head == "cosine" and self.tail.filters == 1
        return self.tail.plain and self.loss in LOSSES and not is_sign

    def model(self) -> nn.Module:
        """The network with random weights, in training mode."""
        torch.manual_seed(self.tail.seed)
        network = Network(self.tail)
        network.head = HEADS[self.head](network.width, self.tail.classes)
        for module in network.head.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
        return network.double()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and class indices of two batches."""
        torch.manual_seed(self.tail.seed + 1)
        sizes = self.tail.batch_sizes
        x = torch.randn(sum(sizes), 2, *self.tail.space, dtype=torch.float64)
        y = torch.randint(self.tail.classes, (len(x),))
        return list(zip(x.split(sizes), y.split(sizes), strict=True))

    def criterion(self, phi: Tensor, y: Tensor) -> Tensor:
        """What the step computes."""
        return (LOSSES | COUPLED)[self.loss](phi, y)

    def counted(self, y: Tensor) -> int:
        """How many samples of a batch the loss counts."""
        return int((ignored(y) >= 0).sum()) if self.loss == "ignored" else len(y)


@st.composite
def tasks(draw: st.DrawFn, dims: int) -> Task:
    """Draw a task; now and then one that may have to be refused."""
    tail = draw(tails(dims))
    sizes = draw(st.sampled_from([(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]))
    classes = max(2, tail.classes)
    tail = replace(tail, head="linear", dtype=torch.float64, batch_sizes=sizes, classes=classes, named=True)
    coupled = draw(st.sampled_from([False] * 12 + [True]))
    loss = draw(st.sampled_from(sorted(COUPLED if coupled else LOSSES)))
    return Task(tail, draw(st.sampled_from(sorted(HEADS))), loss)
