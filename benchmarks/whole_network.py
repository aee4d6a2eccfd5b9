"""What any layer and the whole network cost, and what other packages offer for the trace of the whole network.

Every peer takes (model, images, labels) and returns the trace of the mean cross-entropy's Hessian in all parameters of
a piecewise linear network; EKFAC, which knows no normalisation, that in the weights of convolutions and linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import networks
import torch
from peers import backpack_diagonals, exact_fisher
from torch import Tensor, nn

from lightning_flatness import FlatnessReport, measure

Trace = Callable[[nn.Module, Tensor, Tensor], float]
SAMPLES = 256


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the sum of the exact Fisher diagonal."""
    exact_fisher(model, x, y, ignored=[])
    diagonals = (module.fisher.diag for module in model.modules() if hasattr(module, "fisher"))
    return float(sum(part.sum() for each in diagonals for part in (each.weight, each.bias) if part is not None))


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the sum of the exact generalized Gauss-Newton diagonal."""
    return float(sum(diagonal.sum() for diagonal in backpack_diagonals(model, x, y)))


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the trace from per-sample Jacobians and the softmax's curvature, a few samples at once."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def logits(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters | buffers, (image[None],))[0]

    def trace(image: Tensor) -> Tensor:
        jacobians, probabilities = torch.func.jacrev(logits)(parameters, image), model(image[None])[0].softmax(-1)
        rows = (jacobian.flatten(1) for jacobian in jacobians.values())
        return sum(probabilities @ part.square().sum(1) - (probabilities @ part).square().sum() for part in rows)

    with torch.no_grad():
        return float(torch.func.vmap(trace, chunk_size=16)(x).mean())


def ekfac(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the trace of EKFAC, which is exact, see `peers.ekfac`; only the weights that it knows are measured."""
    import curvlinops

    known = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in known)
    operator = curvlinops.EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        [(x, y)],
        check_deterministic=False,
        fisher_type=curvlinops.FisherType.TYPE2,
    )
    return float(operator.trace)


class Way(NamedTuple):
    """One row of the table.

    Attributes:
        trace: returns a trace, given (model, images, labels).
        exact: the same trace in the report of the whole network.
        target: the project's own, in forward passes.
        module: that has to be installed.
    """

    trace: Trace
    exact: Callable[[FlatnessReport], float]
    target: str = ""
    module: str = "torch"


def jacobian(model: nn.Module, x: Tensor, y: Tensor, layer: str, estimate: bool = False) -> FlatnessReport:
    """Return this package's report of a layer, or of all."""
    return measure(model, [(x, y)], layer, method="jacobian", loss="cross_entropy", estimate=estimate)


def _layer(name: str) -> Way:
    return Way(lambda *data: jacobian(*data, name).hessian_trace, lambda report: report.layers[name].hessian_trace, "6")


def _network(report: FlatnessReport) -> float:
    return report.network_trace


def _weights(report: FlatnessReport) -> float:
    return sum(layer.hessian_trace for layer in report.layers.values())


def ways() -> dict[str, Way]:
    """Return everything that can be imported, by name."""
    modules = networks.resnet20().named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    every = {
        "the last convolution": _layer(names[-1]),
        "a convolution in the middle": _layer(names[len(names) // 2]),
        "the first convolution": _layer(names[0]),
        "the whole network, exactly": Way(lambda *data: jacobian(*data, "all").network_trace, _network, "20"),
        "the whole network, `estimate=True`": Way(
            lambda *data: jacobian(*data, "all", estimate=True).network_trace, _network, "8"
        ),
        "asdfghjkl, exact diagonal": Way(asdl, _network, module="asdl"),
        "BackPACK, DiagGGNExact": Way(backpack, _network, module="backpack"),
        "torch.func, vmap(jacrev)": Way(torch_func, _network),
        "curvlinops, EKFAC, type-2 Fisher (weights)": Way(ekfac, _weights, module="curvlinops"),
    }
    return {name: way for name, way in every.items() if find_spec(way.module)}


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the ResNet-20, images of seeded noise and labels."""
    torch.manual_seed(0)
    return networks.lively(networks.resnet20()), torch.randn(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,))
