"""Batches as they should not be, and a few as they may be, for the fuzz."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from networks import CHANNELS
from torch import Tensor, nn

CLASSES = 3


def with_first(tensor: Tensor, value: Any) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), value)


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "NaN": lambda x: with_first(x, torch.nan),
    "infinite": lambda x: with_first(x, torch.inf),
    "huge": lambda x: 1e300 * x,
    "zero": torch.zeros_like,
    "none": lambda x: x[:0],
    "larger map": lambda x: x.repeat(1, 1, 2, 3),
    "map of one": lambda x: x[:, :, :1, :1],
    "map of none": lambda x: x[:, :, :0],
    "too many channels": lambda x: x.repeat(1, 2, 1, 1),
    "one image": lambda x: x[0],
    "flat": lambda x: x.flatten(1),
    "integers": lambda x: x.long(),
    "bytes": lambda x: (100 * x).byte(),
    "half": Tensor.half,
    "single": Tensor.float,
    "complex": lambda x: x + 0j,
    "boolean": lambda x: x > 0,
    "strided": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "needs gradient": lambda x: x.clone().requires_grad_(),
    "sparse": Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "list": Tensor.tolist,
    "array": Tensor.numpy,
    "None": lambda x: None,
    "text": lambda x: "image",
    "nested": lambda x: (x,),
    "mapping": lambda x: {"image": x},
}
TARGETS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda y: y,
    "too large": lambda y: with_first(y, 3),
    "negative": lambda y: with_first(y, -1),
    "ignored": lambda y: with_first(y, -100),
    "too few": lambda y: y[1:],
    "too many": lambda y: torch.cat([y, y]),
    "none": lambda y: y[:0],
    "scalar": lambda y: y[0],
    "column": lambda y: y[:, None],
    "one-hot": lambda y: nn.functional.one_hot(y, 3),
    "probabilities": lambda y: nn.functional.one_hot(y, 3).double(),
    "soft": lambda y: nn.functional.one_hot(y, 3) * 0.7 + 0.1,
    "more than probabilities": lambda y: nn.functional.one_hot(y, 3) + 0.1,
    "not adding up to one": lambda y: nn.functional.one_hot(y, 3) * 0.4 + 0.2,
    "floats": Tensor.double,
    "NaN": lambda y: y * torch.nan,
    "complex": lambda y: y + 0j,
    "boolean": lambda y: y > 0,
    "bytes": Tensor.byte,
    "short": Tensor.short,
    "meta": lambda y: y.to("meta"),
    "sparse": Tensor.to_sparse,
    "list": Tensor.tolist,
    "array": Tensor.numpy,
    "None": lambda y: None,
    "text": lambda y: "cat",
    "number": lambda y: 1,
    "nested": lambda y: (y,),
    "mapping": lambda y: {"label": y},
}
NESTINGS: dict[str, Callable[[Any, Any], Any]] = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"image": x, "label": y},
    "with more": lambda x, y: (x, y, ["name"]),
    "inputs alone": lambda x, y: x,
    "one-tuple": lambda x, y: (x,),
    "turned": lambda x, y: (y, x),
    "twice nested": lambda x, y: ((x, y),),
    "other keys": lambda x, y: {"a": x, "b": y},
    "targets only": lambda x, y: {"label": y},
    "set": lambda x, y: {1, 2},
    "None": lambda x, y: None,
    "number": lambda x, y: 3,
    "text": lambda x, y: "xy",
    "empty": lambda x, y: (),
}
AROUND: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda batches: batches,
    "iterator": iter,
    "mapping": lambda batches: dict(enumerate(batches)),
    "first batch": lambda batches: batches[0],
    "none": lambda batches: [],
    "None": lambda batches: None,
    "number": lambda batches: 3,
    "text": lambda batches: "batches",
}
# What of this must be measured.
GOOD = {
    "inputs": {"as it is", "larger map", "strided", "expanded", "needs gradient"},
    "targets": {"as it is", "bytes", "short", "probabilities", "soft"},
    "nesting": {"pair", "list", "mapping", "with more"},
    "around": {"list", "iterator"},
}


@dataclass(frozen=True)
class Batches:
    """A network, batches for it, and what is wrong with the batch at one place; names are those of the tables."""

    inputs: str
    targets: str
    nesting: str
    around: str
    place: int
    sizes: tuple[int, ...]
    activation: str
    dtype: torch.dtype
    seed: int

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return all(getattr(self, name) in names for name, names in GOOD.items())

    def model(self) -> nn.Module:
        """The network."""
        torch.manual_seed(self.seed)
        activation = nn.SiLU() if self.activation == "silu" else nn.ReLU()
        tail = [activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
        return nn.Sequential(nn.Conv2d(CHANNELS, 4, 2), nn.BatchNorm2d(4), *tail).to(self.dtype)

    def parts(self) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of each batch, the wrong ones among them."""
        torch.manual_seed(self.seed + 1)
        for place, n in enumerate(self.sizes):
            x, y = torch.randn(n, CHANNELS, 3, 2, dtype=self.dtype), torch.randint(CLASSES, (n,))
            wrong = place == self.place
            yield (INPUTS[self.inputs](x), TARGETS[self.targets](y)) if wrong else (x, y)

    def nested(self) -> list[Any]:
        """Every batch, the wrong one in its own nesting."""
        nestings = [self.nesting if place == self.place else "pair" for place in range(len(self.sizes))]
        return [NESTINGS[nesting](x, y) for nesting, (x, y) in zip(nestings, self.parts(), strict=True)]


def some(table: dict[str, Any], normal: str) -> st.SearchStrategy[str]:
    """A name from the table, more often than not the normal one."""
    return st.just(normal) | st.just(normal) | st.sampled_from(sorted(table))


@st.composite
def batches(draw: st.DrawFn) -> Batches:
    """Draw batches with at most one wrong one."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (2, 1), (1, 2), (2, 2)]))
    return Batches(
        inputs=draw(some(INPUTS, "as it is")),
        targets=draw(some(TARGETS, "as it is")),
        nesting=draw(some(NESTINGS, "pair")),
        around=draw(some(AROUND, "list")),
        place=draw(st.integers(0, len(sizes) - 1)),
        sizes=sizes,
        activation=draw(st.sampled_from(["relu", "silu"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 1000)),
    )
