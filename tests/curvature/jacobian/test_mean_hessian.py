"""The mean curvature of any layer against brute force."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from recorded import gauss_newton_part
from torch import Tensor, nn

from lightning_flatness import oracle
from lightning_flatness.curvature.jacobian import mean_hessian
from lightning_flatness.curvature.jacobian.mean_hessian import GradientHessian, LayerGradients
from lightning_flatness.curvature.jacobian.method import JacobianMethod
from lightning_flatness.functional import signed_eigenvalues
from lightning_flatness.recording.layers_recorder import LayersRecorder


def network(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3), act(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(*first, act(), nn.Flatten(), nn.Linear(16, 5), act(), nn.Linear(5, 4)).double().eval()


def labels(y: Tensor, phi: Tensor) -> Tensor:
    return F.one_hot(y, 4).to(phi)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "binary": lambda phi, y: F.binary_cross_entropy_with_logits(phi, labels(y, phi)),
    "squared error of probabilities": lambda phi, y: F.mse_loss(phi.softmax(1), labels(y, phi)),
}
X, Y = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(7) % 4


def gradients(model: nn.Module, layer: str, loss: Callable[[Tensor, Tensor], Tensor]) -> list[LayerGradients]:
    parts = []
    with LayersRecorder(model, (layer,)) as recorder:
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            with torch.no_grad():
                value = loss(model(x), y)
            parts.append(JacobianMethod().gradients(recorder.take_pass(value), layer))
    return parts


@pytest.mark.parametrize("chunk", [1, 2**25], ids=["little memory", "much memory"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layer", ["0", "3", "7"])
def test_equals_brute_force(layer: str, loss: str, chunk: int) -> None:
    model = network()
    hessian = oracle.layer_hessian(model, layer, X, Y, LOSSES[loss]).mean(0).detach()
    expected = hessian.reshape(hessian.shape[:2].numel(), -1)
    values = torch.linalg.eigvalsh((expected + expected.mT) / 2)
    found = GradientHessian(gradients(model, layer, LOSSES[loss]))
    with mock.patch.object(mean_hessian, "_CHUNK_NUMEL", chunk):
        primal, (dual, signs) = found.primal(), found.dual()
        vector = torch.randn(found.size, dtype=torch.float64)
        product = found.product(vector)
    atol = 1e-9 * float(values.abs().max())
    torch.testing.assert_close(torch.linalg.eigvalsh(primal), values, rtol=0, atol=atol)
    torch.testing.assert_close(product, primal @ vector, rtol=0, atol=atol)
    ours = signed_eigenvalues(dual, signs)
    count = max(len(ours), len(values))
    padded = [F.pad(v, (0, count - len(v))).sort().values for v in (ours, values)]
    torch.testing.assert_close(*padded, rtol=0, atol=atol)
    assert found.trace == pytest.approx(float(values.sum()), abs=atol)
    rank = int(torch.linalg.matrix_rank(expected, rtol=1e-10, hermitian=True))
    assert rank <= found.rank_bound == min(found.size, 7 * (3 if loss == "cross-entropy" else 4))
    assert (found.size, found.samples, found.dual_size) == (len(values), 7, len(ours))
    assert found.gauss_newton() is found


def test_behind_a_curved_network_it_is_the_gauss_newton_part() -> None:
    model = network(nn.Tanh)
    parts = gradients(model, "3", F.cross_entropy)
    expected = gauss_newton_part(model, "3", X)
    torch.testing.assert_close(torch.linalg.eigvalsh(GradientHessian(parts).primal()), torch.linalg.eigvalsh(expected))
    assert {part.curvature for part in parts} == {"ggn"}
