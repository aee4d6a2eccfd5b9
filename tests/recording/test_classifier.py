"""The recorder of the classifier: which layer it takes for one, and what it has on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import hooks
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_flatness import ClassifierMethod, ClassifierRecorder, RecordedPass, UnsupportedTailError, oracle
from lightning_flatness.recording.classifier import _KEPT


class Layers(nn.Module):
    """Linear layers by name, and a function that runs them; the label of every sample is 0."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(3, 3))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def take(model: nn.Module, x: Tensor | None = None, **options: Any) -> RecordedPass:
    x = torch.randn(4, 3) if x is None else x
    with ClassifierRecorder(model, **options) as recorder, torch.no_grad():
        recorded = recorder.take_pass(F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)))
    assert hooks(model) == 0
    assert _get_current_dispatch_mode() is None
    return recorded


def unused(count: int) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        phi = model.a(x)
        for name in "bcdef"[:count]:
            model.get_submodule(name)(phi)
        return phi

    return run


CHOSEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "the last": (lambda m, x: m.b(m.a(x).relu()), "b"),
    "not one for logging": (unused(1), "a"),
    "not several for logging": (unused(_KEPT - 1), "a"),
    "an auxiliary head beside it": (lambda m, x: (m.a(x), m.b(x))[0], "a"),
    "not a function of its weight": (lambda m, x: F.linear(m.a(x), m.b.weight), "a"),
    "its weight, without the bias": (lambda m, x: F.linear(m.b(x), m.a.weight) + m.c(x), "c"),
}


@pytest.mark.parametrize(("run", "name"), CHOSEN.values(), ids=CHOSEN)
def test_the_classifier_is_the_last_layer_that_the_loss_depends_on(
    run: Callable[[Any, Tensor], Tensor], name: str
) -> None:
    model, x = Layers(run, *"abcdef"), torch.randn(4, 3)
    recorded = take(model, x)
    assert recorded.layer == name
    (call,) = recorded.calls
    module, values = model.get_submodule(name), recorded.graph.captures
    assert torch.equal(call.weight, module.weight)
    torch.testing.assert_close(F.linear(values.value(call.inputs), call.weight, call.bias), values.value(call.output))


def test_a_name_says_which() -> None:
    model = Layers(unused(_KEPT + 1), *"abcdef")
    with pytest.raises(UnsupportedTailError, match="depends on the output of one of the last layers"):
        take(model)
    assert take(model, classifier="a").layer == "a"
    with pytest.raises(ValueError, match=r"`classifier` must name one of \['a', 'b'"):
        ClassifierRecorder(model, "z")


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight  # square: the shapes fit


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


NO_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: Transposed(3, 3),
    "scaled": lambda: Scaled(3, 3),
    "none": lambda: nn.Identity(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    ),
    "padded convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 3, 3, 1), nn.Flatten()),
}


@pytest.mark.parametrize("build", NO_LINEAR.values(), ids=NO_LINEAR)
def test_what_is_no_linear_layer_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedTailError, match="linear layer"):
        take(nn.Sequential(build()))


def test_a_layer_that_ran_long_before_is_no_candidate() -> None:
    """Its first call is not on the record any more: the layer before it is measured, which is exact."""

    def run(model: Any, x: Tensor) -> Tensor:
        for name in "abcdef":
            x = model.get_submodule(name)(x)
        return model.a(x)

    model, x = Layers(run, *"abcdef").double(), torch.randn(4, 3, dtype=torch.float64)
    recorded = take(model, x)
    assert recorded.layer == "f"
    expected = oracle.hessian_trace(model, "f", x, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(ClassifierMethod().quantities(recorded).hessian_trace, expected)
    with pytest.raises(UnsupportedTailError, match="acts 2 times"):
        ClassifierMethod().quantities(take(model, x, classifier="a"))


def test_later_passes_hook_the_classifier_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    y = torch.zeros(4, dtype=torch.long)
    with ClassifierRecorder(model) as recorder, torch.no_grad():
        counts = []
        for x in torch.randn(2, 4, 3, dtype=torch.float64):
            loss = F.cross_entropy(model(x), y)
            assert recorder.output is not None
            assert recorder.depends(loss)
            assert recorder.output.shape == (4, 3)
            recorder.require_recorded()
            recorder.take_pass(loss)
            counts.append(hooks(model))
        assert counts == [4, 4]  # before and after the classifier and the network
        assert recorder.layer == recorder.classifier == "4"
        recorder.ignore_passes()
        model(x)
        assert recorder.output is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_the_dtype_of_autocast_are_its_own(dtype: torch.dtype) -> None:
    model, x = Layers(lambda m, x: m.b(m.a(x).relu()), *"ab"), torch.randn(4, 3)
    with ClassifierRecorder(model) as recorder, torch.no_grad(), torch.autocast("cpu", dtype):
        recorded = recorder.take_pass(F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)))
    assert recorded.layer == "b"
    assert torch.equal(recorded.calls[0].weight, model.b.weight)
    assert ClassifierMethod().quantities(recorded).hessian_trace.isfinite().all()


class Gated(nn.Module):
    """A convolution, and a classifier whose output may be multiplied by what the convolution computes."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.gate = nn.Conv1d(1, 3, 2), nn.Linear(3, 3), gate

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x[:, None])
        return self.fc(x) * self.gate(maps.mean(-1))


GATES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "floating": (torch.sigmoid, False),
    "in steps": (lambda z: F.one_hot(z.argmax(1), 3).float() + 1, True),
    "constant": (lambda z: torch.ones(len(z), 3), True),
}


@pytest.mark.parametrize(("gate", "is_alone"), GATES.values(), ids=GATES)
def test_numbers_of_a_convolution_beside_the_classifier_are_noticed(
    gate: Callable[[Tensor], Tensor], is_alone: bool
) -> None:
    """A convolution has no record of its own; what depends on it is watched."""
    model = Gated(gate)
    recorded = take(model)
    assert recorded.layer == "fc"
    assert recorded.is_alone == is_alone


def test_a_convolution_that_is_linear_only_later_is_no_classifier() -> None:
    conv = nn.Conv1d(1, 3, 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x[:, None])[:, :1]).flatten(1)

    with pytest.raises(UnsupportedTailError, match="must end in a linear layer"):
        take(Twice())


def test_an_empty_batch_and_an_error_of_the_network() -> None:
    model = Layers(lambda m, x: m.b(m.a(x).relu()), *"ab")
    with ClassifierRecorder(model) as recorder, torch.no_grad():
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(4, 2))
        with pytest.raises(ValueError, match="at least one sample"):
            recorder.take_pass(model(torch.randn(0, 3)).sum())
        recorder.take_pass(model(torch.randn(4, 3)).sum())
    assert hooks(model) == 0


def test_a_network_in_a_list_is_no_part_of_the_model() -> None:
    model = Layers(lambda self, x: self.parts[0](x))
    model.parts = [nn.Linear(3, 3)]
    with pytest.raises(UnsupportedTailError, match=r"plain list or dictionary .* use `nn\.ModuleList`"):
        take(model)
