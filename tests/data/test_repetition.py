"""The network called once more amid a validation: what no recorder sees is refused, and nothing is changed by it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning_runs import Classifier, everything, trainer, values_of
from networks import RightSwish, Swish
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from lightning_flatness import FlatnessMonitor, UnsupportedTailError


class Wrapped(Classifier):
    """Does something around its network, which is called as `self(x)`."""

    def __init__(self, around: Callable[[Any, Tensor], Any], step: Any = None) -> None:
        super().__init__(step)
        self.around, self.calls, self.seen, self.sizes = around, 0, deque([0], 2), {}
        self.register_buffer("drift", torch.zeros(3, dtype=torch.float64))
        self.memory = torch.zeros(1, dtype=torch.float64)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Any:
        return self.around(self, x)


def norm_of_the_filters(module: Any, x: Tensor) -> Tensor:
    return module.net(x * (1 + module.net.conv2.weight.detach().norm()))


def in_a_thread(module: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return module.net(pool.submit(lambda: x * (1 + module.net.conv2.weight.detach().square().sum())).result())


def through_numpy(module: Any, x: Tensor) -> Tensor:
    return module.net(x + float(np.abs(module.net.conv2.weight.detach().numpy()).sum()))


def added_through_memory(module: Any, x: Tensor) -> Tensor:
    phi = module.net(x)
    phi.detach().numpy()[...] += np.arange(3)
    return phi


UNSEEN = [norm_of_the_filters, in_a_thread, through_numpy, added_through_memory]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("around", UNSEEN, ids=lambda around: around.__name__)
def test_what_leaves_no_trace_is_refused(tmp_path: Any, around: Any, inference_mode: bool) -> None:
    module = Wrapped(around)
    before = module.net.conv2.weight.detach().clone()
    with pytest.raises(UnsupportedTailError, match=r"the output of `Wrapped`"):
        trainer(tmp_path, FlatnessMonitor(strict=True), inference_mode=inference_mode).validate(module, verbose=False)
    assert torch.equal(module.net.conv2.weight, before)
    assert _get_current_dispatch_mode() is None
    run = trainer(tmp_path, FlatnessMonitor(strict=True, verify=False), inference_mode=inference_mode)
    run.validate(module, verbose=False)  # nobody looks
    assert values_of(run)


def counting(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    module.seen.append(module.calls)
    module.sizes[module.calls] = len(x)
    module.drift += 1
    module.memory += 1
    x -= torch.rand(1, generator=module.generator, dtype=x.dtype)  # the inputs themselves
    random.random(), np.random.rand(), torch.rand(1)
    module.log("calls", float(module.calls))
    return module.net(x)


def uncounted(module: Any, x: Tensor) -> Tensor:
    return module.net(x)


def state_of(module: Wrapped) -> list[Any]:
    return [
        module.calls,
        list(module.seen),
        module.sizes,
        module.memory.tolist(),
        module.generator.get_state().tolist(),
    ]


@pytest.mark.parametrize("around", [counting, uncounted], ids=lambda around: around.__name__)
def test_nothing_is_changed(tmp_path: Any, around: Any) -> None:
    results = []
    for callbacks in ([FlatnessMonitor(strict=True)], []):
        random.seed(3), np.random.seed(3)
        module, run = Wrapped(around), trainer(tmp_path, *callbacks, max_epochs=2)
        run.fit(module)
        logged = {key: float(value) for key, value in run.callback_metrics.items() if key in ("calls", "val_loss")}
        results.append([everything(module, run), state_of(module), logged])
    assert results[0] == results[1]


class Modes(Callback):
    """In which modes the validation runs."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_start(self, *_: Any) -> None:
        self.seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    on_validation_batch_end = on_validation_epoch_end = on_validation_batch_start


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_modes_of_the_validation_stay(tmp_path: Any, inference_mode: bool, data: Any) -> None:
    seen = []
    for callbacks in ([FlatnessMonitor(data=data, strict=True)], []):
        modes = Modes()
        run = trainer(tmp_path, *callbacks, modes, inference_mode=inference_mode, max_epochs=1)
        run.fit(Wrapped(uncounted))
        if data == "val":
            run.validate(Wrapped(uncounted), verbose=False)
        seen.append(modes.seen)
    assert seen[0] == seen[1]


def by_calls(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    return module.net(x * module.calls)


def on_objects(module: Any, given: Any) -> Tensor:
    return module.net(given.x if isinstance(given, Box) else given)


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def exchanging(module: Any, x: Tensor) -> Tensor:
    total = x.sum().reshape(1)
    dist.all_reduce(total)
    return module.net(x + 0 * total)


def checkpointed(module: Any, x: Tensor) -> Tensor:
    return checkpoint(module.net, x, use_reentrant=False)


def checkpointed_reentrantly(module: Any, x: Tensor) -> Tensor:
    return checkpoint(module.net, x, use_reentrant=True)


def boxed_step(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(Box(batch[0])), batch[1])


def by_hand(module: Any, batch: Any) -> Tensor:
    x = batch[0]
    for layer in module.net:
        x = layer(x)
    return F.cross_entropy(x, batch[1])


def noted(*_: Any) -> None:
    """A hook of the user."""


SKIPPED: dict[str, tuple[Any, Any, str]] = {
    "state": (by_calls, None, "computes something else when it is called again"),
    "another input": (on_objects, boxed_step, "an object of type `Box`"),
    "called by parts": (uncounted, by_hand, "`net.conv2` is called by itself"),
    "collectives": (exchanging, None, "exchanges tensors with other processes"),
    "numbers": (lambda module, x: (module.net(x).tolist(), module.net(x))[1], None, "used several times"),
    "hooks": (uncounted, None, "`noted`"),
    "no gradient": (checkpointed_reentrantly, None, "autograd cannot differentiate the network"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_repeated_is_left_out_and_said(tmp_path: Any, name: str, one_process: Any) -> None:
    around, step, reason = SKIPPED[name]
    module, monitor = Wrapped(around, step), FlatnessMonitor(strict=True)
    if name == "hooks":
        module.net.act2.register_forward_hook(noted)
    trainer(tmp_path, monitor, inference_mode=False).validate(module, verbose=False)
    (assumed,) = monitor._state.verification.assumed
    assert reason in assumed


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("loaders", [1, 2])
def test_once_in_a_run_and_loader(tmp_path: Any, loaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wrapped(uncounted)
    module.loaders, calls = loaders, []
    monkeypatch.setattr(
        "lightning_flatness.validation.verify_call", lambda recorded, context: calls.append(len(recorded))
    )
    monitor = FlatnessMonitor(strict=True)
    run = trainer(tmp_path, monitor, max_epochs=3)
    run.fit(module)
    assert calls == [4] * loaders
    run.validate(module, verbose=False)
    assert calls == [4] * 2 * loaders


class Half(Classifier):
    """In float32 under autocast, which the step switches on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net.float()

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.net(batch[0].float())
        self.log("val_loss", F.cross_entropy(logits.float(), batch[1]))

    training_step = None


def in_the_dtype(module: Any, x: Tensor) -> Tensor:
    return module.net(x.to(module.net.head.weight))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_precisions_are_those_of_the_pass(tmp_path: Any, precision: Any) -> None:
    monitor = FlatnessMonitor(strict=True)
    trainer(tmp_path, monitor, precision=precision).validate(Wrapped(in_the_dtype).float(), verbose=False)
    assert not monitor._state.verification.assumed


def test_autocast_of_the_step_is_repeated(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(strict=True)
    trainer(tmp_path, monitor).validate(Half(), verbose=False)
    assert not monitor._state.verification.assumed


def activated(function: Any) -> Callable[[Any, Tensor], Tensor]:
    def around(module: Any, x: Tensor) -> Tensor:
        for name, layer in module.net.named_children():
            x = function(x) if name == "act2" else layer(x)
        return x

    return around


def swished(module: Any, batch: Any) -> Tensor:
    return RightSwish.apply(module(batch[0])).square().mean()


@torch.no_grad()
def gate(z: Tensor) -> Tensor:
    return z.sigmoid()


# network, loss -> part of the refusal, or nothing
FUNCTIONS: dict[str, tuple[Any, Any, str]] = {
    "a wrong backward": (activated(Swish.apply), None, r"Autograd must differentiate .* \['Swish'\]"),
    "a right backward": (activated(RightSwish.apply), None, ""),
    "a gate without gradient": (activated(lambda z: z * gate(z)), None, "Autograd must differentiate"),
    "a detached gate": (activated(lambda z: z * z.sigmoid().detach()), None, ""),
    "in the loss": (uncounted, swished, r"derivatives are known; .*\['RightSwish'\]"),
}


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(("around", "step", "refusal"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_derivatives_are_those_of_autograd(
    tmp_path: Any, around: Any, step: Any, refusal: str, inference_mode: bool
) -> None:
    module, monitor = Wrapped(around, step), FlatnessMonitor(strict=True)
    run = trainer(tmp_path, monitor, inference_mode=inference_mode)
    if refusal:
        with pytest.raises(UnsupportedTailError, match=refusal):
            run.validate(module, verbose=False)
    else:
        run.validate(module, verbose=False)
        assert not monitor._state.verification.assumed
    assert all(weight.grad is None for weight in module.parameters())


def test_a_custom_function_in_a_network_that_cannot_be_repeated_is_refused(tmp_path: Any) -> None:
    module = Wrapped(activated(RightSwish.apply))
    module.net.head.register_forward_hook(noted)
    with pytest.raises(UnsupportedTailError, match="RightSwish"):
        trainer(tmp_path, FlatnessMonitor(strict=True)).validate(module, verbose=False)


def test_a_checkpoint_is_repeated(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(strict=True)
    trainer(tmp_path, monitor, inference_mode=False).validate(Wrapped(checkpointed), verbose=False)
    assert not monitor._state.verification.assumed


def gated(module: Any, x: Tensor) -> Tensor:
    """Has no closed form for the convolution: the classifier is measured."""
    a = nn.Sequential(*list(module.net)[:6])(x)
    return module.net.head((a * a.mean(1, keepdim=True).sigmoid()).mean((2, 3)))


def gated_by_the_classifier(module: Any, x: Tensor) -> Tensor:
    return gated(module, x * (1 + module.net.head.weight.detach().norm()))


@pytest.mark.parametrize("around", [gated, gated_by_the_classifier], ids=lambda around: around.__name__)
def test_the_classifiers_own_record_is_verified(tmp_path: Any, around: Any) -> None:
    module, monitor = Wrapped(around), FlatnessMonitor(strict=True)
    run = trainer(tmp_path, monitor, inference_mode=False)
    before = module.net.head.weight.detach().clone()
    if around is gated:
        run.validate(module, verbose=False)
        assert not monitor._state.verification.assumed
        assert "net.head" in monitor.measured
    else:
        with pytest.raises(UnsupportedTailError, match=r"after `net.head` must predict the output of `Wrapped`"):
            run.validate(module, verbose=False)
    assert torch.equal(module.net.head.weight, before)
