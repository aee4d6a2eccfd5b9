"""What the tests of recorded passes share: recording, the loss and measuring in one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness import ForwardRecorder, PooledMethod, RecordedPass, SampleQuantities, UnsupportedTailError
from lightning_flatness.curvature.pooled.certificate import Certificate, certify
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.pooled.method import _pooled_features
from lightning_flatness.data.passes import computed_loss
from lightning_flatness.errors import Refusal
from lightning_flatness.losses import CrossEntropy, Loss
from lightning_flatness.recording.graph import Cut


class Measured(ForwardRecorder):
    """A recorder of a network whose passes are measured in closed form; entering it starts without a certificate."""

    def __init__(
        self,
        model: nn.Module,
        layer: Any = None,
        classifier: Any = None,
        loss: Loss | Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, layer, classifier)
        self.loss = loss or CrossEntropy()
        self.value: Tensor | None = None

    def __enter__(self) -> Measured:
        self.method = PooledMethod()
        super().__enter__()
        return self

    def step(self, target: Tensor | None = None) -> None:
        """Compute the loss of the network's output; without targets the first class is the label of every sample."""
        try:
            self.require_recorded()
        except UnsupportedTailError:
            self.clear()
            raise
        if target is None:
            output = self.output
            target = torch.zeros(len(output if isinstance(output, Tensor) else output[0]), dtype=torch.long)
        self.value = computed_loss(self.loss, self.output, target)

    def passed(self, target: Tensor | None = None) -> RecordedPass:
        """The pass up to its loss, which is computed here if it was not in the step."""
        if self.value is None:
            with torch.no_grad():
                self.step(target)
        value, self.value = self.value, None
        return self.take_pass(value)

    def derivatives(self, target: Tensor | None = None) -> PooledDerivatives:
        return self.method.derivatives(self.passed(target))

    def quantities(self, target: Tensor | None = None) -> SampleQuantities:
        return self.method.quantities(self.passed(target))


def recorded(
    model: nn.Module, x: Tensor, y: Tensor | None = None, loss: Callable[[Any, Any], Tensor] | None = None
) -> RecordedPass:
    """One forward pass without gradients, and the loss of its output."""
    with Measured(model, loss=loss) as recorder:
        with torch.no_grad():
            model(x)
        return recorder.passed(y)


def pooled(recorded: RecordedPass) -> Cut:
    """Where the pooled features lie; a refusal is raised."""
    return required(_pooled_features(recorded))[0]


def certified(recorded: RecordedPass) -> Certificate:
    """The certificate of a pass; a refusal is raised, as it is where a measurement was asked for."""
    return required(certify(recorded, pooled(recorded)))


def required(verdict: Any) -> Any:
    """A verdict; a refusal is raised."""
    if isinstance(verdict, Refusal):
        raise verdict.error()
    return verdict


class Step(nn.Module):
    """A network and what a step computes with it, as one function of all weights."""

    def __init__(self, model: nn.Module, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, *args: Any) -> Tensor:
        return self.step(self.model, *args)


def gauss_newton_part(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The mean over samples of `J^T B J` for cross-entropy and the weight of a layer, shape (p, p)."""
    weight = model.get_submodule(layer).weight.detach()

    def logits(free: Tensor) -> Tensor:
        return torch.func.functional_call(model, {f"{layer}.weight": free}, x)

    jacobian = torch.autograd.functional.jacobian(logits, weight).flatten(2)
    probabilities = logits(weight).detach().softmax(1)
    curvature = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    return torch.einsum("ncp,nce,neq->pq", jacobian, curvature, jacobian) / len(x)


def brute_force(model: nn.Module, layer: str, step: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """Hessian trace and relative flatness of a layer for the number that a step computes of a whole batch.

    Autograd differentiates the step itself twice, one weight after the other: nothing of the package is used.
    """
    whole, name = Step(model, step), f"model.{layer}.weight" if layer else "model.weight"
    weight = whole.get_parameter(name).detach()

    def value(free: Tensor) -> Tensor:
        return torch.func.functional_call(whole, {name: free}, args)

    with torch.random.fork_rng(), torch.enable_grad():
        hessian = torch.autograd.functional.hessian(value, weight)
    rows = weight.flatten(1)
    hessian = hessian.reshape(*rows.shape, *rows.shape)
    return torch.einsum("kiki->", hessian), torch.einsum("kd,ld,kili->", rows, rows, hessian)
