"""What the tests of recorded passes share: recording and measuring in one object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness import ForwardRecorder, PooledMethod, RecordedPass, SampleQuantities
from lightning_flatness.curvature.pooled.certificate import Certificate, certify
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.errors import Refusal
from lightning_flatness.losses import Loss


class Measured(ForwardRecorder):
    """A recorder of a network whose passes are measured in closed form; entering it starts without a certificate."""

    def __init__(self, model: nn.Module, layer: Any = None, classifier: Any = None, loss: Loss | None = None) -> None:
        super().__init__(model, layer, classifier)
        self.loss = loss

    def __enter__(self) -> Measured:
        self.method = PooledMethod(self.loss)
        super().__enter__()
        return self

    def derivatives(self, target: Tensor | None = None) -> PooledDerivatives:
        return self.method.derivatives(self.take_pass(), target)

    def quantities(self, target: Tensor | None = None) -> SampleQuantities:
        return self.method.quantities(self.take_pass(), target)


def recorded(model: nn.Module, x: Tensor) -> RecordedPass:
    """One forward pass without gradients."""
    with ForwardRecorder(model) as recorder:
        with torch.no_grad():
            model(x)
        return recorder.take_pass()


def certified(recorded: RecordedPass) -> Certificate:
    """The certificate of a pass; a refusal is raised, as it is where a measurement was asked for."""
    verdict = certify(recorded)
    if isinstance(verdict, Refusal):
        raise verdict.error()
    return verdict
