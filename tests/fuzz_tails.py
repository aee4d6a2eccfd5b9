"""Random networks for the fuzz: everything about a tail that a user can choose, in sizes that the oracle can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from networks import CHANNELS, CONVS, NORMS
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(F, name)
    for name in (
        "relu leaky_relu relu6 hardtanh elu celu selu silu mish gelu softplus tanh sigmoid hardswish "
        "softsign logsigmoid softshrink hardshrink rrelu"
    ).split()
}
ACTIVATIONS |= {
    "identity": lambda z: z,
    "relu_": lambda z: F.relu(z, inplace=True),
    "leaky_relu_": lambda z: F.leaky_relu(z, 0.2, inplace=True),
    "silu_": lambda z: F.silu(z, inplace=True),
    "hardswish_": lambda z: F.hardswish(z, inplace=True),
    "abs": torch.abs,
    "square": torch.square,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "swish by hand": lambda z: z * z.sigmoid(),
    "maximum": lambda z: torch.maximum(z, 0.1 * z),
    "where": lambda z: torch.where(z > 0, z, z.exp() - 1),
    "clamp": lambda z: z.clamp(min=-0.3, max=1.5),
}
WIRINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda z, skip: 1 * z,  # a copy that may be changed in place
    "add": lambda z, skip: z + skip,
    "add in place": lambda z, skip: z.neg().add_(skip),
    "subtract": lambda z, skip: skip - z,
    "scale": lambda z, skip: z * skip.sigmoid(),
    "divide": lambda z, skip: z / skip.exp(),
    "cat": lambda z, skip: torch.cat([skip, z], 1),
    "cat of slices": lambda z, skip: torch.cat([z[:, 1:], skip[:, :2], z[:, :1]], 1),
    "flip": lambda z, skip: z.flip(1),
    "mask": lambda z, skip: z.masked_fill(skip > 0, 0.3),
}
WITH_SKIP = {"add", "add in place", "subtract", "scale", "divide", "cat", "cat of slices", "mask"}


def local(*pools: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Overlapping windows of 2 where they fit."""
    return lambda a: pools[a.dim() - 3](a, kernel_size=min(2, *a.shape[2:]), stride=1)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda a: a.mean(tuple(range(2, a.dim()))),
    "adaptive": lambda a: (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[a.dim() - 3](a, 1),
    "adaptive max": lambda a: (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[a.dim() - 3](a, 1),
    "amax": lambda a: a.amax(tuple(range(2, a.dim()))),
    "sum": lambda a: a.flatten(2).sum(-1),
    "max pool, mean": lambda a: local(F.max_pool1d, F.max_pool2d, F.max_pool3d)(a).flatten(2).mean(2),
    "average pool, sum": lambda a: local(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)(a).flatten(2).sum(2),
    "weighted": lambda a: a.flatten(2) @ torch.linspace(-0.5, 1, a[0, 0].numel()).to(a),
    "mean and max": lambda a: torch.cat([a.flatten(2).mean(2), a.flatten(2).amax(2)], 1),
    "halves": lambda a: F.adaptive_avg_pool1d(a.flatten(2), 2).flatten(1),
    "median": lambda a: a.flatten(2).median(2).values,
}
# Of one sample: the sum over its labels.
LOSSES: dict[str, Callable[[int], nn.Module]] = {
    "cross-entropy": lambda c: nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": lambda c: nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"),
    "weighted": lambda c: nn.CrossEntropyLoss(torch.arange(c) + 0.5, reduction="sum"),
    "weighted, smoothed": lambda c: nn.CrossEntropyLoss(torch.arange(c) + 0.5, label_smoothing=0.3, reduction="sum"),
    "binary": lambda c: nn.BCEWithLogitsLoss(reduction="sum"),
    "binary, weighted": lambda c: nn.BCEWithLogitsLoss(
        torch.arange(c) + 0.5, reduction="sum", pos_weight=torch.ones(c) / 3
    ),
}
# Tails of which the closed form need not be exact: measured right, or refused.
ODD_WIRINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both signs": lambda z, skip: torch.cat([z, -z], 1),
    "neighbour": lambda z, skip: z + 0.5 * z.roll(1, 1),
    "gate": lambda z, skip: z * z.flatten(2).mean(2).sigmoid().reshape(*z.shape[:2], *[1] * (z.dim() - 2)),
    "gate of the sample": lambda z, skip: z * z.flatten(1).mean(1).clamp(0, 1).reshape(-1, *[1] * (z.dim() - 1)),
    "softmax": lambda z, skip: z.softmax(1),
    "product": lambda z, skip: z * z.flip(1),
    "across the batch": lambda z, skip: z - z.mean(0),
    "blur": lambda z, skip: z + z.roll(1, -1),
    "sorted": lambda z, skip: z.sort(1).values,
}
ODD_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanhshrink": F.tanhshrink,  # its derivative is all cancellation
    "threshold of the map": lambda z: F.softshrink(z - z.amin(2, True)),
}
ODD_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "log-sum-exp": lambda a: a.flatten(2).logsumexp(2),
    "root mean square": lambda a: a.flatten(2).square().mean(2).add(0.1).sqrt(),
    "attention": lambda a: (a.flatten(2) * a.flatten(2).mean(1, keepdim=True).softmax(2)).sum(2),
    "norm of the vector": lambda a: F.normalize(a.flatten(2).mean(2)),
    "curved": lambda a: F.silu(a.flatten(2).mean(2)),
    "first position": lambda a: a.flatten(2)[..., 0],
    "mean of the two largest": lambda a: a.flatten(2).topk(min(2, a[0, 0].numel())).values.mean(2),
}


@dataclass(frozen=True)
class Tail:
    """A network `stem > conv > norm > activation > wiring > pool > norm > head`, and the data to measure it on."""

    space: tuple[int, ...]
    inputs: int
    filters: int
    conv: dict[str, Any]
    norm: str
    activation: str
    wiring: str
    second_activation: str
    pool: str
    norm_after_pool: bool
    head: str
    classes: int
    loss: str
    targets: str
    dtype: torch.dtype
    batch_sizes: tuple[int, ...]
    named: bool
    seed: int

    @property
    def plain(self) -> bool:
        """Whether the closed form is exact for it, so that a refusal is a fault."""
        # Where the certificate looks, far from the recorded values, a square or exponential overflows what comes after.
        divides = self.wiring == "divide" and not self.named  # by the exponential of the layer that is measured
        overflows = (self.activation == "square" or divides) and self.second_activation != "identity"
        return self.activation in ACTIVATIONS and self.wiring in WIRINGS and self.pool in POOLS and not overflows

    def model(self) -> nn.Module:
        """The network with random weights, in training mode."""
        torch.manual_seed(self.seed)
        return Network(self).to(self.dtype)

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        torch.manual_seed(self.seed + 1)
        n, c = sum(self.batch_sizes), self.logits
        x, y = torch.randn(n, CHANNELS, *self.space, dtype=self.dtype), torch.randint(c, (n,))
        probabilities = torch.rand(n, c, dtype=self.dtype)
        soft = self.targets == "soft" or "binary" in self.loss
        return x, probabilities if soft else y

    def criterion(self, dtype: torch.dtype) -> nn.Module:
        """The training loss."""
        return LOSSES[self.loss](self.logits).to(dtype)

    @property
    def logits(self) -> int:
        """The number of logits."""
        return Network(self).width if self.head == "none" else self.classes


class Network(nn.Module):
    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.tail = tail
        dims = len(tail.space)
        self.stem = CONVS[dims](CHANNELS, tail.inputs, 1)
        self.skip = CONVS[dims](tail.inputs, tail.filters, **tail.conv)
        self.conv = CONVS[dims](tail.inputs, tail.filters, **tail.conv)
        self.norm = nn.Identity() if tail.norm == "none" else NORMS[dims](tail.filters, affine=tail.norm == "affine")
        with torch.no_grad():
            self.width = width = self.pooled(torch.zeros(2, CHANNELS, *tail.space)).shape[1]
        self.norm_after_pool = nn.BatchNorm1d(width) if tail.norm_after_pool else nn.Identity()
        if tail.head == "none":
            self.head = nn.Identity()
        elif tail.head == "convolution":
            self.head = nn.Conv1d(width, tail.classes, 1)
        else:
            self.head = nn.Linear(width, tail.classes, bias=tail.head == "linear")
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)

    def pooled(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        skip = self.skip(h) if self.tail.wiring in WITH_SKIP else h  # else it would be the deepest, for nothing
        a = (ACTIVATIONS | ODD_ACTIVATIONS)[self.tail.activation](self.norm(self.conv(h)))
        a = ACTIVATIONS[self.tail.second_activation]((WIRINGS | ODD_WIRINGS)[self.tail.wiring](a, skip))
        return (POOLS | ODD_POOLS)[self.tail.pool](a).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        p = self.norm_after_pool(self.pooled(x))
        return self.head(p.unsqueeze(2)).flatten(1) if self.tail.head == "convolution" else self.head(p)


@st.composite
def tails(draw: st.DrawFn, dims: int) -> Tail:
    """Draw a tail; now and then one that may have to be refused."""

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, dilation = each(st.integers(1, 3 if dims < 3 else 2)), each(st.integers(1, 2))
    space = tuple(d * (k - 1) + 1 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
    padding = draw(st.sampled_from(["same", "valid", tuple(draw(st.integers(0, min(2, s - 1))) for s in space)]))
    conv = {
        "kernel_size": kernel,
        "stride": each(st.integers(1, 2)) if padding != "same" else 1,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    }
    if conv["padding_mode"] == "reflect" and padding == "same":
        # ReflectionPad needs a larger map than its padding
        space = tuple(max(s, d * (k - 1) // 2 + 2) for s, k, d in zip(space, kernel, dilation, strict=True))
    odd = draw(st.sampled_from([*[None] * 12, "wiring", "pool", "activation"]))
    filters = groups * draw(st.integers(1, 4 // groups))
    head = draw(st.sampled_from(["linear", "linear", "no bias", "convolution", *["none"] * (filters > 1)]))
    return Tail(
        space=space,
        inputs=groups * draw(st.integers(1, 2 if dims < 3 else 1)),
        filters=filters,
        conv=conv,
        norm=draw(st.sampled_from(["affine", "none", "plain"])),
        activation=draw(st.sampled_from(sorted(ODD_ACTIVATIONS if odd == "activation" else ACTIVATIONS))),
        wiring=draw(st.sampled_from(sorted(ODD_WIRINGS if odd == "wiring" else WIRINGS))),
        second_activation=draw(st.sampled_from(["identity", "relu_", *sorted(ACTIVATIONS)])),
        pool=draw(st.sampled_from(sorted(ODD_POOLS if odd == "pool" else POOLS))),
        norm_after_pool=draw(st.booleans()),
        head=head,
        classes=draw(st.integers(2, 4)),
        loss=draw(st.sampled_from(["cross-entropy"] * len(LOSSES) + sorted(LOSSES))),
        targets=draw(st.sampled_from(["classes", "classes", "soft"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        batch_sizes=draw(st.sampled_from([(1,), (2,), (1, 1), (2, 1), (1, 2)])),
        named=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def positions(model: Network, x: Tensor) -> int:
    """Return the number of positions of the map of the monitored convolution."""
    with torch.no_grad():
        return prod(model.conv(model.stem(x)).shape[2:])
