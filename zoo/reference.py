"""Hessian trace and relative flatness of one sample by differentiating the whole network, for any architecture.

Nothing is shared with the package. With the logits `phi(W)`, `S = softmax(phi)` and the label's one-hot vector `y`, the
Hessian of the cross-entropy with respect to the weight `W` is

    H = J^T (diag(S) - S S^T) J + sum_c (S - y)_c d2 phi_c / dW2.

`J` is the Jacobian of all logits with respect to the weight. The second term is computed from the layer's output `z`,
which is linear in the weight. Two Hessian-vector products give the Hessian with respect to `z` where it is diagonal:
the product with ones is the diagonal, and the product with a random vector must scale that vector entry by entry. Where
it does not, as with a curved head behind the pooling, all columns are computed. The logits must be linear in the output
of a linear layer; an `AssertionError` says if they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp


class Flatness(NamedTuple):
    """The two numbers of a layer; per sample of shape (n,)."""

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


def _second_order(model: nn.Module, layer: nn.Module, image: Tensor, gradient: Tensor) -> Flatness:
    """Return what `sum_c gradient_c d2 phi_c / dW2` adds to both numbers."""
    inputs, z = _call_of(model, layer, image)

    def weighted_logits(free: Tensor) -> Tensor:
        with _Hook(layer, lambda module, args, output: free.clone()):
            return gradient @ logits_of(model(image))[0]

    pull: Callable[[Tensor], tuple[Tensor]] = vjp(grad(weighted_logits), z)[1]
    diagonal, shake = pull(torch.ones_like(z))[0].detach(), torch.rand_like(z)
    if isinstance(layer, nn.Linear):
        assert not pull(shake)[0].any(), "The logits are curved in the linear layer's output."
        return Flatness(diagonal.sum(), diagonal.sum())
    patches, weight = _patches(layer, inputs), layer.weight.detach().flatten(1)
    group = torch.arange(len(weight)) // (len(weight) // len(patches))
    shaken, expected = pull(shake)[0].detach(), diagonal * shake
    if torch.allclose(shaken, expected, rtol=1e-9, atol=1e-12 * float(diagonal.abs().amax())):
        by_filter = (diagonal.flatten(2)[0] * patches.square().sum(1)[group]).sum(1)
        return Flatness(by_filter.sum(), by_filter @ weight.square().sum(1))
    units = torch.eye(z.numel()).to(z).reshape(-1, *z.shape)
    columns = torch.stack([pull(unit)[0].detach() for unit in units])
    size = len(weight), z[0, 0].numel()
    hessian = columns.reshape(size + size)  # (k, s, l, t)
    gram = torch.einsum("gds,hdt->gsht", patches, patches)
    blocks = torch.stack([torch.einsum("slt,slt->l", hessian[k], gram[group[k]][:, group]) for k in range(len(weight))])
    return Flatness(blocks.trace(), (blocks * (weight @ weight.T)).sum())


def _patches(conv: nn.Module, inputs: Tensor) -> Tensor:
    """Return the input that each output position sees, shape (groups, d, s): a convolution with unit kernels."""
    offsets = prod(conv.kernel_size)
    units = torch.eye(offsets).to(inputs).reshape(offsets, 1, *conv.kernel_size)
    padded = nn.functional.pad(inputs, conv._reversed_padding_repeated_twice)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(conv.kernel_size) - 1]
    seen = convolve(padded.transpose(0, 1), units, stride=conv.stride, dilation=conv.dilation)
    return seen.reshape(conv.groups, -1, seen[0, 0].numel())


def _call_of(model: nn.Module, layer: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and output of the one call of a layer."""
    calls = []
    with (
        torch.no_grad(),
        _Hook(layer, lambda module, args, output: calls.append((args[0].clone(), output.clone()))),
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
