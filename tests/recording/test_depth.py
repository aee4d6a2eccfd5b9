"""Which convolution is measured: the deepest, whatever the order of the lines and the way they are written."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness import ForwardRecorder, UnsupportedTailError
from lightning_flatness.recording import memories
from lightning_flatness.recording.depth import DepthWatch, LayerChoice, is_counted
from lightning_flatness.recording.dispatch import dispatcher


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Any:
    yield
    assert _get_current_dispatch_mode() is None


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


Branch = Callable[[Any, Tensor], Tensor]


class Lines(nn.Module):
    """Two lines that do not depend on each other, and a last one that takes both results."""

    def __init__(self, swapped: bool, first: Branch, second: Branch, join: Branch, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in {"stem": conv(2), **modules, "head": nn.Linear(4, 3)}.items():
            self.add_module(name, module)
        self.lines, self.swapped, self.join = (first, second), swapped, join

    def forward(self, x: Tensor) -> Tensor:
        h, results = F.relu(self.stem(x)), [x, x]
        for index in (1, 0) if self.swapped else (0, 1):
            results[index] = self.lines[index](self, h)
        return self.head(self.join(self, results[0], results[1]).mean((2, 3)))


def added(m: Any, y: Tensor, k: Tensor) -> Tensor:
    return F.relu(y + k)


def two(m: Any, h: Tensor) -> Tensor:
    return m.c2(F.relu(m.c1(h)))


def one(m: Any, h: Tensor) -> Tensor:
    return m.other(h)


def added_in_place(m: Any, h: Tensor) -> Tensor:
    y = m.c1(h)
    y += h
    return m.c2(F.relu_(y))


def written_in_parts(m: Any, h: Tensor) -> Tensor:
    buffer = h.new_empty(h.shape)
    buffer[:, :2] = m.c1(h)
    buffer[:, 2:] = 1.0
    return m.c2(buffer)


def through_views(m: Any, h: Tensor) -> Tensor:
    return m.c2(m.c1(h).flatten(2).unflatten(2, h.shape[2:]).transpose(2, 3)[..., :5].detach().transpose(2, 3))


def functional(m: Any, h: Tensor) -> Tensor:
    return m.c1(F.conv2d(h, torch.ones(4, 4, 1, 1)))


def attended(m: Any, h: Tensor) -> Tensor:
    rows = m.norm(h).flatten(2).mT
    for _ in range(5):
        rows = F.gelu(m.linear(F.scaled_dot_product_attention(rows, rows, rows)))
    return rows.mT.unflatten(2, h.shape[2:])


def gated(*gate: nn.Module) -> Branch:
    def line(m: Any, h: Tensor) -> Tensor:
        pooled = h.mean((2, 3), keepdim=True)
        for layer in (m.g1, m.g2):
            pooled = layer(pooled if isinstance(layer, nn.Conv2d) else pooled.flatten(1)).reshape(-1, 4, 1, 1)
        return m.other(h * pooled)

    return line


def after_a_join(m: Any, y: Tensor, k: Tensor) -> Tensor:
    return F.relu(m.late(y + k))


C: dict[str, Callable[[], nn.Module]] = {"c1": conv, "c2": conv, "other": lambda: conv(kernel=1)}
# name -> (two lines, what joins them, modules beside the stem and the head, the layer; the key says why)
NETWORKS: dict[str, tuple[Branch, Branch, Branch, dict[str, Callable[[], nn.Module]], str]] = {
    "two convolutions are deeper than a shortcut": (two, one, added, C, "c2"),
    "a large kernel is not deeper": (two, one, added, C | {"other": lambda: conv(kernel=7)}, "c2"),
    "of the same depth, the one with more weights": (
        *(lambda m, h: m.c1(h), one, added),
        {"other": lambda: conv(kernel=1), "c1": conv},
        "c1",
    ),
    "groups have fewer weights": (
        *(lambda m, h: m.c1(h), one, added),
        {"c1": lambda: conv(groups=4), "other": conv},
        "other",
    ),
    "of the same depth and size, the first by name": (
        *(lambda m, h: m.c1(h), one, added),
        {"other": conv, "c1": conv},
        "other",
    ),
    "what follows both is deeper": (two, one, after_a_join, C | {"late": lambda: conv(kernel=1)}, "late"),
    "added in place": (added_in_place, one, added, C, "c2"),
    "written in parts": (written_in_parts, one, added, C | {"c1": lambda: conv(4, 2)}, "c2"),
    "through views": (through_views, one, added, C, "c2"),
    "a functional convolution counts": (functional, one, added, C, "c1"),
    "a transposed one counts": (
        *(lambda m, h: m.c1(m.up(h)), one, added),
        C | {"up": lambda: nn.ConvTranspose2d(4, 4, 1)},
        "c1",
    ),
    "activations, normalisation, attention and linear layers do not": (
        *(lambda m, h: m.c1(attended(m, h)), lambda m, h: m.other(m.c2(h)), added),
        C | {"norm": lambda: nn.GroupNorm(2, 4), "linear": lambda: nn.Linear(4, 4)},
        "other",
    ),
    "a gate of 1 x 1 convolutions on pooled features does not": (
        *(two, gated(), added),
        C | {"other": conv, "g1": lambda: conv(kernel=1), "g2": lambda: conv(kernel=1)},
        "c2",
    ),
    "nor one of linear layers": (
        *(two, gated(), added),
        C | {"other": conv, "g1": lambda: nn.Linear(4, 4), "g2": lambda: nn.Linear(4, 4)},
        "c2",
    ),
    "in another branch, whether it is deeper or not": (
        *(two, lambda m, h: m.other(F.relu(m.c3(F.relu(m.c4(h))))), added),
        C | {"c3": conv, "c4": conv},
        "other",
    ),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("why", NETWORKS)
def test_the_deepest_is_chosen(why: str, mode: Any, swapped: bool) -> None:
    first, second, join, modules, layer = NETWORKS[why]
    torch.manual_seed(0)
    model = Lines(swapped, first, second, join, **{name: build() for name, build in modules.items()}).eval()
    x, y = torch.randn(3, 2, 5, 6), torch.tensor([0, 1, 2])
    with mode():
        plain = model(x)
    with ForwardRecorder(model) as recorder:
        for _ in range(2):
            with mode():
                output = model(x)
                loss = F.cross_entropy(output, y)
            assert torch.equal(output, plain)
            assert recorder.take_pass(loss).layer == layer
            assert dispatcher().tracers == []


class Wired(nn.Module):
    """Convolutions, each of which takes the sum of some others; they run in a given order."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.sources = [sorted(rng.sample(range(index), rng.randint(min(1, index), index))) for index in range(7)]
        self.sizes = [rng.choice([1, 3]) for _ in self.sources]
        for index in rng.sample(range(7), 7):
            self.add_module(f"c{index}", conv(2, 2, self.sizes[index]))
        self.head = nn.Linear(2, 3)
        self.order = self.drawn_order(rng)

    def drawn_order(self, rng: random.Random) -> list[int]:
        order: list[int] = []
        while len(order) < len(self.sources):
            ready = [i for i, needed in enumerate(self.sources) if i not in order and set(needed) <= set(order)]
            order.append(rng.choice(ready))
        return order

    def forward(self, x: Tensor) -> Tensor:
        done: dict[int, Tensor] = {}
        for index in self.order:
            inputs = sum((F.relu(done[source]) for source in self.sources[index]), start=x)
            done[index] = self.get_submodule(f"c{index}")(inputs)
        return self.head(F.relu(sum(done.values())).mean((2, 3)))

    def deepest(self) -> str:
        """By the definition, without running anything."""
        names = [name for name, _ in self.named_modules()]

        def depth(index: int) -> int:
            return 1 + max(map(depth, self.sources[index]), default=0)

        best = max(range(7), key=lambda i: (depth(i), self.sizes[i], -names.index(f"c{i}")))
        return f"c{best}"


@pytest.mark.parametrize("seed", range(40))
def test_the_deepest_of_random_networks_in_random_orders(seed: int) -> None:
    rng = random.Random(seed)
    model = Wired(rng).eval()
    x, y = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    for _ in range(3):
        model.order = model.drawn_order(rng)
        with ForwardRecorder(model) as recorder, torch.no_grad():
            assert recorder.take_pass(F.cross_entropy(model(x), y)).layer == model.deepest()


class Shared(nn.Module):
    """One convolution runs at two depths, another one with more weights between them."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.shared, self.between, self.head, self.swapped = conv(2, 2), conv(2, 2, 5), nn.Linear(2, 3), swapped

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            deep, shallow = self.shared(self.between(x)), self.shared(x)
        else:
            shallow, deep = self.shared(x), self.shared(self.between(x))
        return self.head(F.relu(shallow + deep).mean((2, 3)))


def refusal(model: nn.Module, layer: str | None = None, pick: Any = lambda output: output) -> str:
    with (
        ForwardRecorder(model.eval(), layer) as recorder,
        torch.no_grad(),
        pytest.raises(UnsupportedTailError) as caught,
    ):
        recorder.take_pass(F.cross_entropy(pick(model(torch.randn(3, 2, 5, 5))), torch.tensor([0, 1, 2])))
    return str(caught.value)


def test_a_convolution_that_runs_at_two_depths_is_recorded_from_its_first_call_or_refused() -> None:
    assert "`shared` ran before `between`" in refusal(Shared(swapped=False))
    with ForwardRecorder(model := Shared(swapped=True).eval()) as recorder, torch.no_grad():
        recorded = recorder.take_pass(F.cross_entropy(model(torch.randn(3, 2, 5, 5)), torch.tensor([0, 1, 2])))
    assert (recorded.layer, len(recorded.calls)) == ("shared", 2)


class WithAuxiliary(nn.Module):
    """The auxiliary branch is deeper than the one of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.head = conv(2), conv(), nn.Linear(4, 3)
        self.aux = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.main(h)).mean((2, 3))), self.aux(h)


def test_if_the_deepest_does_not_reach_the_loss_the_others_are_named() -> None:
    said = refusal(WithAuxiliary(), pick=lambda output: output[0])
    assert "depends on the output of `aux.2`; it does not depend on it" in said
    assert "these ran, the deepest first: ['main', 'aux.0', 'stem']" in said


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize("deep", [True, False])
def test_one_that_does_not_use_its_own_weight_has_a_depth_too(deep: bool) -> None:
    own, foreign = conv(2, 2), Standardized(2, 2, 3, padding=1)
    tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    model = nn.Sequential(*([own, foreign] if deep else [foreign, own]), *tail)
    if deep:
        assert "`1` must convolve with its own `weight`" in refusal(model)
    else:
        with ForwardRecorder(model.eval()) as recorder, torch.no_grad():
            loss = F.cross_entropy(model(torch.randn(3, 2, 5, 5)), torch.tensor([0, 1, 2]))
            assert recorder.take_pass(loss).layer == "1"


def test_a_failure_of_the_watch_does_not_reach_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = WithAuxiliary().eval()
    for name in ("before", "after"):
        with monkeypatch.context() as patch:
            patch.setattr(memories, "tensors" if name == "after" else "written", broken)
            assert "ZeroDivisionError" in refusal(model, pick=lambda output: output[0])


def broken(*_: Any) -> Any:
    raise ZeroDivisionError


def test_a_named_layer_needs_no_depths() -> None:
    model = WithAuxiliary().eval()
    with ForwardRecorder(model, "main") as recorder, torch.no_grad():
        for _ in range(2):
            output, _ = model(torch.randn(3, 2, 5, 5))
            assert not any(isinstance(listener, DepthWatch) for listener in dispatcher().tracers)
            assert recorder.take_pass(F.cross_entropy(output, torch.tensor([0, 1, 2]))).layer == "main"


def test_depths_follow_the_memory_and_keep_nothing_alive() -> None:
    watch = DepthWatch()
    dispatcher().attach(watch)
    try:
        z = F.conv2d(torch.randn(2, 1, 4, 4), torch.randn(3, 1, 3, 3))
        other = torch.zeros(2, 3)
        other[:, 0] = z[:, 0, 0, 0]
        many = torch._foreach_add([z, other], 1.0)
        depths = [watch.of(tree) for tree in (z, {"a": [z[0]]}, other, many, torch.ones(2), None)]
        sparse = torch.eye(3).to_sparse() @ z[0, 0, 0, :1].expand(3, 1)
        del z, other, many, sparse
        fresh = [torch.from_numpy(torch.empty(2, 3, 2, 2).numpy()) for _ in range(50)]  # as the loader does
    finally:
        dispatcher().detach(watch)
    assert depths == [1, 1, 1, 1, 0, 0]
    assert all(memory.expired() for memory in watch._numbers)
    assert watch.of(fresh) == 0
    assert watch.failure is None


def test_ranks() -> None:
    choice = LayerChoice(["a", "b", "c"])
    assert choice.deepest is None
    assert [choice.add("b", conv(2, 2), 1), choice.add("a", conv(2, 2), 1), choice.add("c", conv(2, 2, 1), 1)] == [
        *(True, True, False)
    ]
    assert choice.ranking == ["a", "b", "c"]
    assert choice.add("c", conv(2, 2, 1), 2)
    assert not choice.add("b", conv(2, 2), 1)
    assert choice.ranking == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("inputs", "kernel", "output", "counted"),
    [
        ((1, 1), (1, 1), (1, 1), False),
        ((4, 4), (4, 4), (1, 1), False),
        ((1, 2), (1, 1), (1, 2), True),
        ((3,), (3,), (3,), True),  # padded
        ((1, 1), (3, 3), (1, 1), True),
        ((2, 2), (1, 1), (1, 1), True),  # with a stride
    ],
)
def test_what_sees_all_of_its_input_at_once_is_a_linear_layer(
    inputs: tuple[int, ...], kernel: tuple[int, ...], output: tuple[int, ...], counted: bool
) -> None:
    assert is_counted(torch.Size(inputs), kernel, torch.Size(output)) is counted
