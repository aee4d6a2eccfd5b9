"""What wraps, compiles or saves memory in the user's network: measured all the same, and not disturbed."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_runs import (
    KEYS,
    Classifier,
    Network,
    assert_same,
    everything,
    given_batches,
    hooks,
    report_of,
    trainer,
    values_of,
)
from networks import Net, conv2d
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_flatness import FlatnessMonitor, measure
from lightning_flatness.errors import UnsupportedTailError
from lightning_flatness.recording.dispatch import GraphTracer

pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Tail(nn.Sequential):
    def forward(self, h: Tensor) -> Tensor:  # one of torch's own would not be compiled in place
        for module in self:
            h = module(h)
        return h


class Blocks(Network):
    """The same network with its tail in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        names = "conv2 norm2 act2 drop".split()
        self.tail = Tail(OrderedDict((name, self._modules.pop(name)) for name in names))

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


class SavingOtherwise(Saving):
    reentrant = False


def classifier(network: Callable[[], nn.Module] = Blocks) -> Classifier:
    module = Classifier()
    torch.manual_seed(0)
    module.net = network().double()
    return module


def fitted(tmp_path: Any, module: Any, monitored: bool, **options: Any) -> tuple[list[Any], Any]:
    """All that a training leaves behind, and its Trainer."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    run = trainer(tmp_path, *[FlatnessMonitor(strict=True, **options)] * monitored, max_epochs=3)
    run.fit(module)
    return everything(getattr(module, "_orig_mod", module), run), run


Change = Callable[[Classifier, str], Any]


def wrapped(*names: str) -> Change:
    def change(module: Classifier, backend: str) -> None:
        for name in names:
            module.set_submodule(name, torch.compile(module.get_submodule(name), backend=backend))

    return change


def in_place(name: str) -> Change:
    return lambda module, backend: module.get_submodule(name).compile(backend=backend)


def method(module: Classifier, backend: str) -> None:
    module.forward = torch.compile(module.forward, backend=backend)


COMPILED: dict[str, Change] = {
    "network": wrapped("net"),
    "network in place": in_place("net"),
    "tail": wrapped("net.tail"),
    "tail in place": in_place("net.tail"),
    "convolution": wrapped("net.tail.conv2"),
    "classifier": wrapped("net.head"),
    "pieces": wrapped("net.conv1", "net.tail.conv2", "net.tail.norm2", "net.head"),
    "forward of the LightningModule": method,
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("name", "change"), COMPILED.items(), ids=COMPILED)
def test_a_compiled_module_is_measured_and_not_compiled_again(
    tmp_path: Any, name: str, change: Change, backend: str, every: int
) -> None:
    results, compiled = [], []
    for monitored in (True, False):
        torch._dynamo.reset()
        counters.clear()
        module = classifier()
        change(module, backend)
        result, run = fitted(tmp_path, module, monitored, every_n_validations=every)
        results.append(result)
        compiled.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
        if monitored:
            with torch.compiler.set_stance("force_eager"):
                assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert results[0] == results[1]
    own = name in ("network", "network in place")  # whose beginning the monitor has compiled for itself
    assert own < compiled[0][0] <= compiled[1][0] + own
    assert compiled[0][1] <= compiled[1][1]


@pytest.mark.parametrize("change", [wrapped("net"), in_place("net"), wrapped("net.tail")])
@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, []),
        ({"max_samples": 4}, [1, 2]),
        ({"max_samples": 5}, [2]),
        ({"target": lambda batch: 1 / 0, "loss": "cross_entropy"}, [1, 2]),
        ({"data": given_batches()}, [0, 1, 2]),
    ],
    ids=["all", "first batch", "five samples", "refused", "own passes"],
)
def test_runs_compiled_where_nothing_is_measured(
    tmp_path: Any, change: Change, options: dict[str, Any], compiled: list[int]
) -> None:
    ran: list[int] = []

    class Stepping(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.batch = index
            super().validation_step(batch, index)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(module.batch)
            return graph(*arguments)

        return run

    module = Stepping()
    module.net = Blocks().double()
    change(module, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the refusal
        trainer(tmp_path, FlatnessMonitor(**options)).validate(module, verbose=False)
    assert sorted(set(ran)) == compiled
    assert hooks(module) == 0


class Quiet(Classifier):
    """Logs nothing: the compiled steps of Lightning 2.6 cannot."""

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_lightning_module(tmp_path: Any, backend: str) -> None:
    results = []
    for monitored in (True, False):
        torch._dynamo.reset()
        module = Quiet()
        result, run = fitted(tmp_path, torch.compile(module, backend=backend), monitored)
        results.append(result)
        if monitored:
            with torch.compiler.set_stance("force_eager"):
                assert_same(values_of(run), report_of(module, module.val_dataloader()))
    assert results[0] == results[1]


def with_norms(weight_norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = Blocks()
        weight_norm(network.tail.conv2), weight_norm(network.head)
        return network

    return build


def frozen(*names: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = Blocks()
        for name in names:
            network.get_submodule(name).requires_grad_(False)
        return network

    return build


class Returning(Blocks):
    """Returns its logits and features in some container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        features = self.flatten(self.pool(self.tail(self.act(self.norm1(self.conv1(x))))))
        return self.container(self.head(features), features)


class ModelOutput(OrderedDict):
    """Has its entries as attributes too, as those of transformers do."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Reading(Classifier):
    def forward(self, x: Tensor) -> Any:
        output = self.net(x)
        if isinstance(output, tuple):
            return output[0]
        return output if isinstance(output, Tensor) else output["logits"]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "checkpointing": SavingOtherwise,
    "reentrant checkpointing": Saving,
    "frozen convolution": frozen("tail.conv2"),
    "frozen tail": frozen("tail"),
    "frozen up to the classifier": frozen("conv1", "norm1", "tail"),
    "frozen classifier": frozen("head"),
    "weight norm": with_norms(parametrizations.weight_norm),
    "spectral norm": with_norms(parametrizations.spectral_norm),
    "spectral norm by a hook": with_norms(spectral_norm),
    "tuple": lambda: Returning(lambda logits, features: (logits, features)),
    "dictionary": lambda: Returning(lambda logits, features: {"features": features, "logits": logits}),
    "ModelOutput": lambda: Returning(lambda logits, features: ModelOutput(logits=logits, hidden_states=(features,))),
}


def plain(module: Classifier) -> Classifier:
    """The same network without anything around it."""
    copied, network = Reading(), module.eval().net
    copied.net = Blocks().double()
    weights = {f"{name}.weight": network.get_submodule(name).weight for name in ("tail.conv2", "head")}
    copied.net.load_state_dict(network.state_dict() | weights, strict=False)
    return copied


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_a_network_that_does_more_than_compute(tmp_path: Any, build: Callable[[], nn.Module]) -> None:
    results = []
    for monitored in (True, False):
        torch.manual_seed(0)
        module = Reading()
        module.net = build().double()
        result, run = fitted(tmp_path, module, monitored)
        results.append(result)
        if monitored:
            assert_same(values_of(run), report_of(plain(module), module.val_dataloader()))
            before = module.net.state_dict()
            assert_same(values_of(run), report_of(module, module.val_dataloader()))
            assert all(torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
    assert results[0] == results[1]


def shared_twice(module: Classifier, batch: Any) -> Tensor:
    net = module.net
    h = net.act(net.norm1(net.conv1(batch[0])))
    for _ in range(2):
        h = F.pad(net.tail(h), (0, 0, 0, 0, 0, -1))  # the same block again, on three of its four channels
    return net.head(net.flatten(net.pool(F.pad(h, (0, 0, 0, 0, 0, 1))))).logsumexp(1).mean()


def first_pass_counts(module: Classifier, batch: Any) -> Tensor:
    logits = module(batch[0])
    module(batch[0].flip(3))
    return F.cross_entropy(logits, batch[1])


def second_network(module: Classifier, batch: Any) -> Tensor:
    """A teacher that is not part of the module."""
    with torch.no_grad():
        TEACHER(batch[0])
    return module.loss(batch)


def two_views(module: Classifier, batch: Any) -> Tensor:
    return F.cross_entropy((module(batch[0]) + module(batch[0].flip(3))) / 2, batch[1])


def halves(module: Classifier, batch: Any) -> Tensor:
    first, second = (module(part) for part in batch[0].chunk(2))
    return F.cross_entropy(torch.cat([first, second]), batch[1])


def every_other(module: Classifier, batch: Any) -> Tensor:
    module.batches = getattr(module, "batches", 0) + 1
    return module.loss(batch) if module.batches % 2 else torch.zeros(())


TEACHER = Blocks().double().eval()
# What validation does with the network, and why it cannot be measured; None: it is.
STEPS: dict[str, tuple[Callable[[Classifier, Any], Tensor], str | None]] = {
    "again without a loss": (first_pass_counts, None),
    "with a teacher": (second_network, None),
    "mean of two views": (two_views, "2 calls of `net.tail.conv2`|one tensor with a row per sample"),
    "half a batch at a time": (halves, "2 calls of `net.tail.conv2`|one tensor with a row per sample"),
    "in every other batch": (every_other, "none did"),
    "never": (lambda module, batch: torch.zeros(()), "none did"),
    "one block twice": (shared_twice, "once more|2 calls|`convolution`, mixes the filters"),
}


@pytest.mark.parametrize(("step", "refusal"), STEPS.values(), ids=STEPS)
def test_validation_calls_the_network_as_it_likes(tmp_path: Any, step: Any, refusal: str | None) -> None:
    module = classifier()
    module.step = step
    monitor = FlatnessMonitor(method="pooled", strict=refusal is None)
    run = trainer(tmp_path, monitor, max_epochs=3, num_sanity_val_steps=0)
    if refusal is None:
        run.fit(module)
        assert_same(values_of(run), report_of(module, module.val_dataloader()))
        return
    with pytest.warns(UserWarning, match=refusal) as caught:
        run.fit(module)
    assert sum("FlatnessMonitor" in str(warning.message) for warning in caught) == 1
    assert not KEYS & set(run.callback_metrics)
    assert (run.current_epoch, hooks(module)) == (3, 0)


@pytest.mark.parametrize("last", ["net", "teacher"])
def test_of_two_equal_networks_the_first_by_name_is_measured_or_the_named_one(tmp_path: Any, last: str) -> None:
    module = classifier()
    module.teacher = Blocks().double()
    order = ["teacher", "net"] if last == "net" else ["net", "teacher"]
    module.step = lambda m, batch: sum(F.cross_entropy(m.get_submodule(name)(batch[0]), batch[1]) for name in order)
    named = FlatnessMonitor(layer="teacher.tail.conv2", classifier="teacher.head", name="named", strict=True)
    run = trainer(tmp_path, FlatnessMonitor(strict=True), named)
    run.validate(module, verbose=False)
    assert_same(values_of(run), report_of(module, module.val_dataloader()))
    module.net = module.teacher
    assert_same(values_of(run, "/named"), report_of(module, module.val_dataloader()))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_a_computed_weight_that_is_used_again_is_refused(norm: Callable[..., nn.Module]) -> None:
    def scaled(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.conv(h) * m.conv.weight.mean((1, 2, 3))[:, None, None])

    model = Net(norm(conv2d()), tail=scaled).eval()
    with pytest.raises(UnsupportedTailError, match="once more"):
        measure(model, [(torch.randn(4, 2, 5, 5), torch.randint(3, (4,)))], method="pooled")


def test_memory_of_a_computed_weight_may_be_used_by_others() -> None:
    """Each access computes the weight anew, and what an earlier one computed is gone."""
    tracer, z = GraphTracer(), torch.ones(1)
    tracer.graph.add_input(z)
    for size in [2**power for power in range(4, 19)] * 4:
        tracer.forbid_storage(torch.zeros(size))
        other = torch.ones(size)  # gets the memory that has just become free, if any did
        tracer.start()
        z + other
        tracer.stop()
    assert tracer.graph.incomplete_because(99) is None
