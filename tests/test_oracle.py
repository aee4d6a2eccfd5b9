"""The oracle against Hessians derived by hand and against torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_flatness.oracle import hessian_trace, layer_hessian, relative_flatness


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 4, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (5,), generator=generator)


def network(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), activation, *head).double()


def test_softmax_regression_by_hand(data: tuple[Tensor, Tensor]) -> None:
    """H = B (x) x x^T with B = diag S - S S^T: Tr H = |x|^2 (1 - |S|^2), kappa = |x|^2 <V, B V>."""
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).double(), data
    weight, features, s = model[1].weight.detach(), x.flatten(1), model(x).softmax(1).detach()
    curvature = s.diag_embed() - s[:, :, None] * s[:, None, :]
    squared = features.square().sum(1)
    kappa = squared * (s @ weight.square().sum(1) - (s @ weight).square().sum(1))
    expected = torch.einsum("ncb,ni,nj->ncibj", curvature, features, features)
    torch.testing.assert_close(layer_hessian(model, "1", x, y), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(hessian_trace(model, "1", x, y), squared * (1 - s.square().sum(1)), rtol=1e-12, atol=0)
    torch.testing.assert_close(relative_flatness(model, "1", x, y), kappa, rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.ReLU(inplace=True)], ids=str)
def test_same_as_autograd(activation: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """The mean over the samples is the Hessian of the mean loss, computed by torch.autograd.functional."""
    model, (x, y) = network(activation).eval(), data

    def mean_loss(weight: Tensor) -> Tensor:
        z = nn.functional.conv2d(x, weight, model[0].bias, padding=1)
        return nn.functional.cross_entropy(model[1:](z), y)

    expected = torch.autograd.functional.hessian(mean_loss, model[0].weight.detach())
    torch.testing.assert_close(layer_hessian(model, "0", x, y).mean(0), expected.reshape(4, 18, 4, 18))


def test_rescaling_filters_changes_the_trace_only(data: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = network(nn.ReLU()), data
    trace, kappa = hessian_trace(model, "0", x, y), relative_flatness(model, "0", x, y)
    scale = torch.tensor([0.2, 0.7, 2.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(scale[:, None, None, None])
        model[0].bias.mul_(scale)
        model[6].weight.div_(scale)
    torch.testing.assert_close(relative_flatness(model, "0", x, y), kappa, rtol=1e-12, atol=0)
    assert ((hessian_trace(model, "0", x, y) / trace - 1).abs() > 0.01).all()


def test_other_loss(data: tuple[Tensor, Tensor]) -> None:
    """Half the squared error has the identity as its Hessian in the outputs: trace = C |x|^2."""
    model, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).double(), data
    y = torch.randn(5, 3, dtype=torch.float64)
    trace = hessian_trace(model, "1", x, y, loss=lambda output, target: (output - target).square().sum() / 2)
    torch.testing.assert_close(trace, 3 * x.flatten(1).square().sum(1))


def test_operator_without_forward_formula(data: tuple[Tensor, Tensor]) -> None:
    """An operator that only reverse mode can differentiate falls back on reverse-over-reverse."""

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(z: Tensor) -> Tensor:
            return z * z

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * cotangent

    class Activation(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.function = function

        def forward(self, z: Tensor) -> Tensor:
            return self.function(z)

    expected = layer_hessian(network(Activation(torch.square)), "0", *data)
    torch.testing.assert_close(layer_hessian(network(Activation(Square.apply)), "0", *data), expected)


def test_leaves_the_model_as_it_was(data: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = network(nn.ReLU()), data
    model[1].eval()
    model[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    layer_hessian(model, "0", x, y)
    with pytest.raises(RuntimeError, match="expected input"):
        layer_hessian(model, "0", x[:, :1], y)
    assert [module.training for module in model.modules()] == [
        True,
        True,
        False,
        True,
        True,
        True,
        True,
        True,
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("layer", ["2", "5.weight", "head"])
def test_unknown_layer_lists_candidates(layer: str, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"got '{layer}'. Choose one of \['0', '6'\]"):
        layer_hessian(network(nn.ReLU()), layer, *data)
