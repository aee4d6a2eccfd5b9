"""What wraps, compiles or saves memory in the user's network: measured all the same, and not disturbed."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from test_callback import KEYS, Classifier, Network, assert_same, everything, hooks, report_of, trainer, values_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_flatness import FlatnessMonitor


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


class Blocks(Network):
    """The same network with its tail in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        names = "conv2 norm2 act2 drop".split()
        self.tail = nn.Sequential(OrderedDict((name, self._modules.pop(name)) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(self.conv1(x)))
        return self.head(self.flatten(self.pool(self.tail(h))))


class Saving(Blocks):
    """Forgets what is between the stages and computes it again."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        def stem(x: Tensor) -> Tensor:
            return self.act(self.norm1(self.conv1(x)))

        def tail(h: Tensor) -> Tensor:
            return self.flatten(self.pool(self.tail(h)))

        x = x.requires_grad_(self.training)  # or the reentrant kind has no gradient
        h = checkpoint(stem, x, use_reentrant=self.reentrant)
        return self.head(checkpoint(tail, h, use_reentrant=self.reentrant))


class SavingTwice(Saving):
    reentrant = False


def classifier(network: Callable[[], nn.Module] = Blocks) -> Classifier:
    module = Classifier()
    torch.manual_seed(0)
    module.net = network().double()
    return module


def fitted(tmp_path: Any, module: Any, monitored: bool, **options: Any) -> tuple[list[Any], Any]:
    """All that a training leaves behind, and its Trainer."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    run = trainer(tmp_path, *[FlatnessMonitor(strict=True, **options)] * monitored, num_sanity_val_steps=0)
    run.fit(module)
    return everything(getattr(module, "_orig_mod", module), run), run


Change = Callable[[Classifier, str], Any]


def wrapped(*names: str) -> Change:
    def compile_them(module: Classifier, backend: str) -> None:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(
                module.get_submodule(parent), child, torch.compile(module.get_submodule(name), backend=backend)
            )

    return compile_them


def in_place(*names: str) -> Change:
    def compile_them(module: Classifier, backend: str) -> None:
        for name in names:
            module.get_submodule(name).compile(backend=backend)

    return compile_them


def methods(module: Classifier, backend: str) -> None:
    module.forward = torch.compile(module.forward, backend=backend)


COMPILED: dict[str, Change] = {
    "network": wrapped("net"),
    "network in place": in_place("net"),
    "tail": wrapped("net.tail"),
    "tail in place": in_place("net.tail"),
    "convolution": wrapped("net.tail.conv2"),
    "convolution in place": in_place("net.tail.conv2"),
    "classifier": wrapped("net.head"),
    "pieces": wrapped("net.conv1", "net.tail.conv2", "net.tail.norm2", "net.head"),
    "LightningModule's forward": methods,
}


def graphs() -> int:
    return sum(counters["stats"].values()) and counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_compiled_modules(tmp_path: Any, change: Change, backend: str) -> None:
    results, compiled = [], []
    for monitored in (True, False):
        torch._dynamo.reset()
        counters.clear()
        module = classifier()
        change(module, backend)
        result, run = fitted(tmp_path, module, monitored)
        results.append(result)
        compiled.append((counters["stats"]["unique_graphs"], sum(counters["recompiles"].values())))
        if monitored:
            with torch.compiler.set_stance("force_eager"):
                assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert results[0] == results[1]
    assert 0 < compiled[0][0] <= compiled[1][0]
    assert compiled[0][1] <= compiled[1][1]
