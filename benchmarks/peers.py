"""What other packages offer for the trace of the Hessian in the last convolution, one function each.

Every function takes (model, convolution, images, labels) and returns the trace of the mean cross-entropy's Hessian in
the convolution's weight. Only that weight requires a gradient, which spares the peers all other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

Trace = Callable[[nn.Module, str, Tensor, Tensor], float]


class Peer(NamedTuple):
    """One row of the comparison."""

    name: str
    module: str  # that has to be installed; torch itself for what needs no package
    exact: bool
    trace: Trace


def only_weight(model: nn.Module, layer: str) -> nn.Parameter:
    """Let only the convolution's weight require a gradient, and return it."""
    weight = model.get_submodule(layer).weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    return weight


def asdl(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return the sum of the exact Fisher diagonal."""
    convolution = model.get_submodule(layer)
    exact_fisher(model, x, y, [module for module in model.modules() if module is not convolution])
    return float(convolution.fisher.diag.weight.sum())


def exact_fisher(model: nn.Module, x: Tensor, y: Tensor, ignored: list[nn.Module]) -> None:
    """Give every module but the ignored ones the diagonal of its exact Fisher matrix."""
    from asdl import FISHER_EXACT, LOSS_CROSS_ENTROPY, SHAPE_DIAG, FisherConfig, get_fisher_maker

    config = FisherConfig(
        FISHER_EXACT, [SHAPE_DIAG], loss_type=LOSS_CROSS_ENTROPY, data_size=len(x), ignore_modules=ignored
    )
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, x)
    maker.setup_loss_call(nn.functional.cross_entropy, None, y)
    maker.forward_and_backward()


def backpack(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return the sum of the exact generalized Gauss-Newton diagonal."""
    return float(sum(diagonal.sum() for diagonal in backpack_diagonals(model, x, y)))


def backpack_diagonals(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the exact generalized Gauss-Newton diagonal of every parameter that requires a gradient."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    if not hasattr(model, "extended"):
        model.extended = [extend(model, use_converter=True).eval()]  # in a list: not a submodule of itself
    network = model.extended[0]
    loss = extend(nn.CrossEntropyLoss())(network(x), y)
    with backpack(DiagGGNExact()):
        loss.backward()
    return [parameter.diag_ggn_exact for parameter in network.parameters() if hasattr(parameter, "diag_ggn_exact")]


def curvlinops(products: int, estimator: str, model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return an estimate from Hessian-vector products."""
    import curvlinops

    operator = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), [only_weight(model, layer)], [(x, y)], check_deterministic=False
    )
    return float(getattr(curvlinops, estimator)(operator, products))


def ekfac(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return the trace of EKFAC with the loss's exact curvature in the logits.

    EKFAC approximates the matrix, not its trace: it keeps the diagonal of the Gauss-Newton matrix in an orthogonal
    basis, and the sum of that diagonal is the same in every basis.
    """
    import curvlinops

    operator = curvlinops.EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [only_weight(model, layer)],
        [(x, y)],
        check_deterministic=False,
        fisher_type=curvlinops.FisherType.TYPE2,
    )
    return float(operator.trace)


def eigenthings(products: int, model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return a Hutch++ estimate from Hessian-vector products."""
    from hessian_eigenthings import HessianOperator, supervised_loss, trace

    chosen = f"{layer}.weight"
    operator = HessianOperator(
        model, [(x, y)], supervised_loss(nn.CrossEntropyLoss()), param_filter=lambda name, _: name == chosen
    )
    return trace(operator, num_matvecs=products).estimate


def pyhessian(probes: int, model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return a Hutchinson estimate; a tolerance of 0 makes it use all probes."""
    from pyhessian import hessian

    estimates = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=x.is_cuda).trace(maxIter=probes, tol=0)
    return float(sum(estimates) / len(estimates))


def torch_func(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> float:
    """Return the trace from per-sample Jacobians and the softmax's curvature."""
    name = f"{layer}.weight"
    constants = {key: value.detach() for key, value in (*model.named_parameters(), *model.named_buffers())}

    def logits(weight: Tensor, image: Tensor) -> Tensor:
        return torch.func.functional_call(model, constants | {name: weight}, (image[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(logits), (None, 0), chunk_size=64)(constants[name], x).flatten(2)
    with torch.no_grad():
        probabilities = model(x).softmax(-1)
    mean = torch.einsum("nc,ncd->nd", probabilities, jacobian)
    second = torch.einsum("nc,ncd->n", probabilities, jacobian.square())
    return float((second - mean.square().sum(-1)).mean())


PEERS = (
    Peer("asdfghjkl, exact diagonal", "asdl", True, asdl),
    Peer("torch.func, vmap(jacrev)", "torch", True, torch_func),
    Peer("BackPACK, DiagGGNExact", "backpack", True, backpack),
    Peer("curvlinops, EKFAC, type-2 Fisher", "curvlinops", True, ekfac),
    Peer("curvlinops, XTrace, 12 products", "curvlinops", False, partial(curvlinops, 12, "xtrace")),
    Peer("curvlinops, Hutch++, 12 products", "curvlinops", False, partial(curvlinops, 12, "hutchpp_trace")),
    Peer("hessian-eigenthings, Hutch++, 9 products", "hessian_eigenthings", False, partial(eigenthings, 9)),
    Peer("PyHessian, Hutchinson, 10 probes", "pyhessian", False, partial(pyhessian, 10)),
)


def prepared(model: nn.Module, layer: str) -> nn.Module:
    """Return a copy of the model on which only the convolution's weight requires a gradient."""
    model = deepcopy(model)
    only_weight(model, layer)
    return model


def installed() -> list[Peer]:
    """Return the peers that can be imported."""
    return [peer for peer in PEERS if find_spec(peer.module)]
