"""Hessian trace and relative flatness of one sample by differentiating the whole network, for any architecture.

Nothing is shared with the package. With the logits `phi(W)`, `S = softmax(phi)` and the label's one-hot vector `y`, the
Hessian of the cross-entropy with respect to the weight `W` is

    H = J^T (diag(S) - S S^T) J + sum_c (S - y)_c d2 phi_c / dW2.

`J` is the Jacobian of all logits with respect to the weight. The second term is computed from the convolution's output
`z`, which is linear in the weight. Two Hessian-vector products give the Hessian with respect to `z` where it is
diagonal: the product with ones is the diagonal, and the product with a random vector must scale that vector entry by
entry. Where it does not, an `AssertionError` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp


class Flatness(NamedTuple):
    """The two numbers of a convolution; per sample of shape (n,)."""

    trace: Tensor
    relative: Tensor


def terms(model: nn.Module, layer: str, images: Tensor, labels: Tensor) -> tuple[Flatness, Flatness]:
    """Return both terms of both numbers for every image, each passed through the network by itself."""
    samples = [_sample(model, layer, image[None], int(label)) for image, label in zip(images, labels, strict=True)]
    first, second = (Flatness(*map(torch.stack, zip(*term, strict=True))) for term in zip(*samples, strict=True))
    return first, second


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a network of any of the libraries returns."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _sample(model: nn.Module, layer: str, image: Tensor, label: int) -> tuple[Flatness, Flatness]:
    weight = model.get_submodule(layer).weight.detach()

    def logits(free: Tensor) -> Tensor:
        return logits_of(functional_call(model, {f"{layer}.weight": free}, (image,)))[0]

    phi = logits(weight).detach()
    softmax = phi.softmax(0)
    curvature = softmax.diag() - softmax[:, None] * softmax
    jacobian = jacrev(logits)(weight).flatten(2)
    aligned = weight.flatten(1).T @ jacobian  # (c, d, d): sum_k W_ki J_ckj
    gradient = softmax - nn.functional.one_hot(torch.tensor(label), len(phi))
    first = Flatness(
        (curvature * torch.einsum("akd,bkd->ab", jacobian, jacobian)).sum(),
        (curvature * torch.einsum("aij,bij->ab", aligned, aligned)).sum(),
    )
    return first, _second_order(model, model.get_submodule(layer), image, gradient.detach())


def _second_order(model: nn.Module, conv: nn.Module, image: Tensor, gradient: Tensor) -> Flatness:
    """Return what `sum_c gradient_c d2 phi_c / dW2` adds to both numbers."""
    inputs, z = _call_of(model, conv, image)

    def weighted_logits(free: Tensor) -> Tensor:
        with _Hook(conv, lambda module, args, output: free.clone()):
            return gradient @ logits_of(model(image))[0]

    pull: Callable[[Tensor], tuple[Tensor]] = vjp(grad(weighted_logits), z)[1]
    diagonal, shake = pull(torch.ones_like(z))[0].detach(), torch.rand_like(z)
    rounding = 1e-12 * float(diagonal.abs().amax())
    torch.testing.assert_close(pull(shake)[0].detach(), diagonal * shake, rtol=1e-9, atol=rounding)
    squared_norm = _patches(conv, inputs).square().sum(1).repeat_interleave(conv.out_channels // conv.groups, 0)
    by_filter = (diagonal.flatten(2)[0] * squared_norm).sum(1)
    return Flatness(by_filter.sum(), by_filter @ conv.weight.detach().flatten(1).square().sum(1))


def _patches(conv: nn.Module, inputs: Tensor) -> Tensor:
    """Return the input that each output position sees, shape (groups, d, s): a convolution with unit kernels."""
    offsets = prod(conv.kernel_size)
    units = torch.eye(offsets).to(inputs).reshape(offsets, 1, *conv.kernel_size)
    padded = nn.functional.pad(inputs, conv._reversed_padding_repeated_twice)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(conv.kernel_size) - 1]
    seen = convolve(padded.transpose(0, 1), units, stride=conv.stride, dilation=conv.dilation)
    return seen.reshape(conv.groups, -1, seen[0, 0].numel())


def _call_of(model: nn.Module, conv: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and output of the one call of a convolution."""
    calls = []
    with (
        torch.no_grad(),
        _Hook(conv, lambda module, args, output: calls.append((args[0].clone(), output.clone()))),
    ):
        model(image)
    ((inputs, output),) = calls
    return inputs, output


class _Hook:
    """A forward hook for the length of a `with` statement."""

    def __init__(self, module: nn.Module, hook: Callable) -> None:
        self.module, self.hook = module, hook

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self.hook)

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()
