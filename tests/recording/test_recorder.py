"""The recorder: exact in whatever way the forward pass runs, and unnoticed by it."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import SUPPORTED, Case
from networks import Net, conv2d, residual, tied
from recorded import Measured
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lightning_flatness import ForwardRecorder, oracle
from lightning_flatness.curvature.pooled.certificate import certify
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.errors import GraphError, UnsupportedTailError
from lightning_flatness.recording.dispatch import dispatcher

CASES = {case.name: case for case in SUPPORTED}
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Any:
    yield
    assert _get_current_dispatch_mode() is None


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


@functools.cache
def expected(case: Case) -> Tensor:
    return oracle.hessian_trace(case.model(), case.layer, *case.data())


def assert_same(value: Tensor, reference: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(value.double(), reference.double(), rtol=rtol, atol=1e-12)


def run(model: nn.Module, x: Tensor, mode: Any = torch.no_grad, recorder: Measured | None = None, y: Any = None) -> Any:
    """A pass of the network, and the loss of a recorder in the same mode."""
    with mode():
        output = model(x.clone())
        if recorder is not None:
            recorder.step(y)
    return output


@each_mode
@pytest.mark.parametrize(
    "name", ["relu in place without norm", "silu", "residual in place", "dense block", "global max"]
)
def test_exact_and_unnoticed_in_every_mode(name: str, mode: Any) -> None:
    case = CASES[name]
    model, (x, y) = case.model().eval(), case.data()
    plain = run(model, x, mode)
    with Measured(model) as recorder:
        for _ in range(2):  # finding the modules, then only listening to them
            output = run(model, x, mode, recorder, y)
            assert torch.equal(output, plain)
            assert (output.requires_grad, output.is_inference()) == (plain.requires_grad, plain.is_inference())
            assert_same(recorder.quantities(y).hessian_trace, expected(case))
            assert torch.is_grad_enabled()
    assert hooks(model) == 0


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "not contiguous": lambda x: x.mT.contiguous().mT,
    "leaf of a graph": lambda x: x.clone().requires_grad_(),
}


@each_mode
@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_the_input_does_not_matter(change: Callable[[Tensor], Tensor], mode: Any) -> None:
    case = CASES["silu"]
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model) as recorder:
        with mode():
            model(change(x))
            recorder.step(y)
        assert_same(recorder.quantities(y).hessian_trace, expected(case))


PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], Any], float]] = {
    "float32": (torch.float32, torch.no_grad, 1e-3),
    "bf16-true": (torch.bfloat16, torch.no_grad, 0.2),
    "bf16-mixed": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16), 0.2),
}


@pytest.mark.parametrize("name", ["relu", "silu", "residual"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_of_the_pass(precision: str, name: str) -> None:
    dtype, mode, rtol = PRECISIONS[precision]
    case = CASES[name]
    model, (x, y) = case.model().to(dtype).eval(), case.data()
    plain = run(model, x.to(dtype), mode)
    with Measured(model) as recorder:
        for _ in range(2):
            assert torch.equal(run(model, x.to(dtype), mode, recorder, y), plain)
            derivatives = recorder.derivatives(y)
            assert derivatives.logits.dtype == derivatives.jacobian.dtype == torch.float32
            assert_same(sample_quantities(derivatives).hessian_trace.mean(), expected(case).mean(), rtol)


def test_gradients_of_the_caller_are_the_same_to_the_last_bit() -> None:
    """In training mode, with a graph and an accumulated gradient; dropout-free networks can be measured there."""
    case = Case("training", lambda: Net(act=lambda z: F.silu(z, inplace=True).mul(1), norm=False))
    (x, y), models = case.data(), [case.model().train() for _ in range(2)]
    with Measured(models[0]) as recorder:
        for _ in range(2):
            for model in models:
                F.cross_entropy(model(x), y).backward()
            assert_same(recorder.quantities(y).hessian_trace, expected(case))
    for plain, recorded in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain.grad, recorded.grad)


@pytest.mark.parametrize(
    ("act", "message"),
    [(nn.Sequential(nn.BatchNorm2d(4)), "mixes samples"), (nn.Dropout2d(0.5), "random")],
)
def test_layers_in_training_mode_are_refused(act: nn.Module, message: str) -> None:
    case = Case("training", lambda: Net(act=act, norm=False))
    model, (x, y) = case.model().train(), case.data()
    with Measured(model) as recorder, torch.no_grad():
        model(x)
        with pytest.raises(UnsupportedTailError, match=f"{message}.*eval mode"):
            recorder.quantities(y)


@pytest.mark.parametrize("name", ["relu", "1x1 convolution as classifier", "conv is classifier", "nested"])
def test_listens_to_the_modules_that_matter(name: str) -> None:
    case = CASES[name]
    model, (x, y) = case.model().eval(), case.data()
    user = model.register_forward_hook(lambda *_: None)
    with Measured(model) as recorder:
        assert "" in hooked(model)
        run(model, x)
        recorder.quantities(y)
        of_interest = {case.layer, case.classifier or case.layer}
        around = {name for name, module in model.named_modules() if any(True for _ in module.children())}
        assert set(hooked(model)) - around == of_interest
        assert (recorder.layer, recorder.classifier) == (case.layer, case.classifier or recorder.classifier)
    assert hooked(model) == [""]
    user.remove()


def test_batches_of_other_sizes() -> None:
    case = CASES["gelu"]
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model) as recorder:
        for part in (slice(0, 3), slice(3, 4), slice(0, 5), slice(3, 5)):
            run(model, x[part])
            assert_same(recorder.quantities(y[part]).hessian_trace, expected(case)[part])


def test_certifies_once_and_again_when_the_tail_changes() -> None:
    """A tail that the network takes in some batches only."""
    case = Case("branch", lambda: Net(tail=lambda m, h: F.silu(m.conv(h)) if m.deep else F.relu(m.conv(h)).neg()))
    model, (x, y) = case.model().eval(), case.data()
    expected = {}
    for model.deep in (True, False):
        expected[model.deep] = oracle.hessian_trace(model, "conv", x, y)
    counts = []
    with (
        mock.patch("lightning_flatness.curvature.pooled.method.certify", wraps=certify) as spy,
        Measured(model) as recorder,
    ):
        for model.deep in (True, True, False, False, True):
            run(model, x)
            assert_same(recorder.quantities(y).hessian_trace, expected[model.deep])
            counts.append(spy.call_count)
    assert counts == [1, 1, 2, 2, 3]


class Broken(RuntimeError):
    pass


@each_mode
@pytest.mark.parametrize("where", ["stem", "conv", "norm", "act", "pool", "head"])
def test_an_error_of_the_network_leaves_nothing_behind(where: str, mode: Any) -> None:
    """In the first and in a later batch; the recorder goes on if the caller does."""
    case = CASES["relu in place"]
    model, (x, y) = copy.deepcopy(case.model()).eval(), case.data()  # the table's activations are shared
    fail = itertools.cycle([True, False, True, False])

    def break_down(*_: Any) -> None:
        if next(fail):
            raise Broken

    model.get_submodule(where).register_forward_hook(break_down)
    with Measured(model) as recorder:
        for _ in range(2):
            with pytest.raises(Broken):
                run(model, x, mode)
            recorder.clear()
            run(model, x, mode, recorder, y)
            assert_same(recorder.quantities(y).hessian_trace, expected(case))
    assert hooks(model) == 1
    with pytest.raises(Broken), Measured(model):
        run(model, x, mode)
    assert hooks(model) == 1
    assert _get_current_dispatch_mode() is None


def test_an_error_of_the_recorder_does_not_reach_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().eval(), case.data()
    plain = run(model, x)
    monkeypatch.setattr("lightning_flatness.recording.weights.WeightCopies.of", lambda copies, module: 1 / 0)
    with Measured(model) as recorder:
        assert torch.equal(run(model, x), plain)
        with pytest.raises(UnsupportedTailError, match="ZeroDivisionError"):
            recorder.quantities(y)


class Counted(Net):
    """Counts the arithmetic of a part of its forward pass, with a mode of its own."""

    part, count = "nothing", 0

    def counting(self, *parts: str) -> Any:
        return Counting(self) if self.part in parts else contextlib.nullcontext()

    def forward(self, x: Tensor) -> Tensor:
        with self.counting("all"):
            with self.counting("stem"):
                h = self.stem(x)
            with self.counting("convolution"):
                z = self.conv(h)
            if self.part == "after the convolution":
                with Counting(self):
                    return self.head(F.relu(z).mean((2, 3)))
            with self.counting("activation"):
                p = F.relu(z).mean((2, 3))
            with self.counting("classifier"):
                return self.head(p)


class Counting(TorchDispatchMode):
    def __init__(self, owner: Counted) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.owner.count += func.overloadpacket.__name__ not in ("detach", "clone", "view", "reshape", "equal")
        return func(*args, **(kwargs or {}))


PARTS = ["nothing", "all", "stem", "convolution", "after the convolution", "activation", "classifier"]


@pytest.mark.parametrize("part", PARTS)
def test_modes_of_the_caller_see_what_they_would_and_stay_where_they_are(part: str) -> None:
    case = Case("modes", Counted)
    model, (x, y) = case.model().eval(), case.data()
    reference = expected(case)
    model.part = part
    plain = run(model, x)
    count, model.count = model.count, 0
    with Measured(model) as recorder:
        for _ in range(2):
            assert torch.equal(run(model, x), plain)
            assert (model.count, _get_current_dispatch_mode() in (None, dispatcher())) == (count, True)
            model.count = 0
            with contextlib.suppress(UnsupportedTailError):
                assert_same(recorder.quantities(y).hessian_trace, reference)
            assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("layers", list(itertools.permutations(["conv", "branch"])), ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_several_recorders_on_one_model(layers: tuple[str, str], order: int) -> None:
    case = CASES["inception"]
    model, (x, y) = case.model().eval(), case.data()
    values = {layer: oracle.hessian_trace(model, layer, x, y) for layer in layers}
    with Measured(model, layers[0]) as first, Measured(model, layers[1]) as second:
        for _ in range(2):
            run(model, x)
            for recorder in (first, second)[::order]:
                assert_same(recorder.quantities(y).hessian_trace, values[recorder.layer])


def test_the_pass_of_the_loss_is_measured() -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model) as recorder:
        for _ in range(2):
            run(model, x)
            run(model, x.flip(3) * 2)
            assert_same(recorder.quantities(y).hessian_trace, expected(case))
        recorder.ignore_passes()
        run(model, x)
        with pytest.raises(UnsupportedTailError, match="none did"):
            recorder.quantities(y)


class ByKeyword(Net):
    def forward(self, pixels: Tensor, *, scale: float = 1.0) -> Tensor:
        p = self.pool(F.relu(self.norm(self.conv(input=self.stem(pixels)))))
        return self.head(input=p.flatten(1))


class OfObjects(Net):
    """Takes what only its author knows and returns nothing."""

    def forward(self, batch: Any) -> None:
        self.logits = super().forward(batch.x)


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


CALLED = Case("called", Net, classifier=None)
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "keyword": (ByKeyword, lambda m, x: m(pixels=x, scale=2.0), "conv"),
    "slots": (lambda: Net(output=lambda phi, p: Slots(phi)), lambda m, x: m(x), "conv"),
    "compiled name": (lambda: nn.ModuleDict({"_orig_mod": Net()}), lambda m, x: m["_orig_mod"](x), "conv"),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_way_to_call(name: str) -> None:
    build, call, layer = CALLS[name]
    model, (x, y) = Case("called", build, classifier=None).model().eval(), CASES["relu"].data()
    with Measured(model) as recorder:
        for _ in range(2):
            with torch.no_grad():
                call(model, x)
            assert_same(recorder.quantities(y).hessian_trace, expected(CALLED))
    assert recorder.layer == layer


def test_a_network_that_returns_nothing() -> None:
    """Its loss can be said all the same."""
    model, (x, y) = Case("called", OfObjects, classifier=None).model().eval(), CASES["relu"].data()
    with Measured(model, loss=lambda _, y: F.cross_entropy(model.logits, y)) as recorder:
        for _ in range(2):
            with torch.no_grad():
                model(SimpleNamespace(x=x))
            assert_same(recorder.quantities(y).hessian_trace, expected(CALLED))
    with Measured(model) as recorder:
        model(SimpleNamespace(x=x))
        with pytest.raises(ValueError, match=r"got NoneType.*`loss=lambda output"):
            recorder.quantities(y)


def test_a_weight_that_is_computed() -> None:
    """The closed form is in the weight that the convolution uses; asking for it changes nothing."""
    model, (x, y) = Case("norm", lambda: Net(parametrizations.spectral_norm(conv2d()))).model().eval(), CALLED.data()
    plain = CALLED.model().eval()
    plain.load_state_dict(model.state_dict() | {"conv.weight": model.conv.weight}, strict=False)
    before = copy.deepcopy(model.state_dict())
    with Measured(model) as recorder:
        run(model, x)
        assert_same(recorder.quantities(y).hessian_trace, oracle.hessian_trace(plain, "conv", x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def recurrent(m: Net, h: Tensor) -> Tensor:
    for _ in range(2):
        h = m.act(m.conv(F.relu(m.first(h))))
    return h


REUSED: dict[str, Callable[[], nn.Module]] = {
    "one weight, two modules": lambda: tied(
        Net(conv2d(inputs=4), tail=lambda m, h: m.act(m.conv(F.relu(m.first(h)))), first=conv2d(inputs=4))
    ),
    "scaled by itself": lambda: Net(tail=lambda m, h: m.conv(h) * m.conv.weight.mean((1, 2, 3))[:, None, None]),
    "a block applied twice": lambda: Net(conv2d(3), tail=recurrent, first=conv2d(3)),
}


@pytest.mark.parametrize("sizes", [[5], [2, 3]], ids=str)
@pytest.mark.parametrize("name", REUSED)
def test_a_weight_that_is_used_twice_is_refused(name: str, sizes: list[int]) -> None:
    case = Case(name, REUSED[name], classifier=None)
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model) as recorder, torch.no_grad():
        model(x.split(sizes)[0])
        with pytest.raises(UnsupportedTailError):
            recorder.quantities(y.split(sizes)[0])


class WorksInPlace(Net):
    """Works in place on the convolution's input and on a skip after the classifier, as a second head may."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        phi = self.head(self.pool(residual(self, h)).flatten(1))
        self.later(h)
        return phi


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_happens_after_the_classifier_does_not_matter_or_is_noticed(mode: Any) -> None:
    case = Case("in place", lambda: WorksInPlace(conv2d(3), nn.SiLU()))
    model, (x, y) = case.model().eval(), case.data()
    model.later = torch.relu
    reference = oracle.hessian_trace(model, "conv", x, y)
    model.later = torch.relu_
    with Measured(model) as recorder:
        for _ in range(2):
            run(model, x, mode, recorder, y)
            with contextlib.suppress(GraphError):  # refused, where it can be noticed
                assert_same(recorder.quantities(y).hessian_trace, reference)


@pytest.mark.parametrize("swapped", ["functional_call", "copied"])
def test_weights_swapped_for_the_pass_are_the_ones_that_count(swapped: str) -> None:
    """As an exponential moving average does around the validation step."""
    case = CASES["relu"]
    model, (x, y) = case.model().eval(), case.data()
    averaged = case.model().eval()
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(1.5)
    own = {name: parameter.clone() for name, parameter in model.named_parameters()}
    other = dict(averaged.named_parameters())
    references = [oracle.hessian_trace(m, "conv", x, y) for m in (model, averaged)]
    with Measured(model) as recorder:
        for weights, reference in zip((own, other), references, strict=True):
            with torch.no_grad():
                if swapped == "functional_call":
                    torch.func.functional_call(model, weights, (x,))
                    recorder.step(y)
                else:
                    for name, parameter in model.named_parameters():
                        parameter.data.copy_(weights[name])
                    model(x)
                    recorder.step(y)
                    for name, parameter in model.named_parameters():
                        parameter.data.copy_(own[name])
            assert_same(recorder.quantities(y).hessian_trace, reference)


class Unbatched(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.conv(self.stem(x)))).flatten(-3))


@each_mode
def test_a_single_sample_without_a_batch(mode: Any) -> None:
    """Refused, or as one of a batch; its logits have no row per sample that cross-entropy could take."""
    case = Case("unbatched", Unbatched)
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model, loss=lambda phi, y: F.cross_entropy(phi[None], y)) as recorder:
        run(model, x[0], mode, recorder, y[:1])
        with contextlib.suppress(UnsupportedTailError):
            assert_same(recorder.quantities().hessian_trace, expected(case)[:1])
    with Measured(model) as recorder, pytest.raises(ValueError, match="two logits or more; got one"):
        run(model, x[0], mode, recorder, y[:1])


def test_an_inference_mode_that_ends_before_the_loss_is_named() -> None:
    model, x = Net().eval(), torch.randn(5, 2, 5, 4)
    with ForwardRecorder(model) as recorder:
        with torch.inference_mode():
            model(x)
            recorder.require_recorded()
        with pytest.raises(UnsupportedTailError, match=r"same inference mode.*`conv`.*torch\.no_grad"):
            recorder.require_recorded()
        recorder.clear()
        with torch.no_grad():
            logits = model(x)
        recorder.require_recorded()
        assert recorder.take_pass(logits.square().mean()).graph.operations


def test_names_that_do_not_exist() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"`layer`.*'stem\.0'.*got 'con'"):
        ForwardRecorder(model, layer="con")
    with pytest.raises(ValueError, match=r"`classifier`.*'head'.*got 'norm'"):
        ForwardRecorder(model, classifier="norm")
    assert hooks(model) == 0


def test_nothing_ran() -> None:
    model = Net()
    with Measured(model) as recorder, pytest.raises(UnsupportedTailError, match=r"none did.*'conv', 'stem\.0'"):
        recorder.quantities()
    assert hooks(model) == 0


def test_only_the_weights_that_matter_are_kept() -> None:
    case = CASES["inception"]
    model, (x, y) = case.model().eval(), case.data()
    with Measured(model) as recorder:
        for _ in range(2):
            run(model, x)
            recorder.quantities(y)
        assert set(recorder._copies._known) == {model.conv, model.head}
