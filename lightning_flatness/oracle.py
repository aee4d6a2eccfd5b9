r"""Computes trace and relative flatness directly from their definitions, with the full Hessian in memory.

Slow, obvious, and independent of the rest of the package. `torch.func` differentiates the loss of one sample
twice with respect to one weight, and the definitions are applied to the result. The oracle is meant for tiny networks
in float64, in tests and in the documentation: a Hessian has \((K D)^2\) entries per sample, with \(K\) output channels
and \(D\) weights per output channel.

All functions take the same arguments, which `layer_hessian` describes. Lower is flatter for every quantity here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def layer_hessian(
    model: nn.Module,
    layer: str,
    x: Tensor,
    y: Tensor,
    loss: Loss = nn.functional.cross_entropy,
) -> Tensor:
    r"""Return the full Hessian of each sample's loss with respect to the weight of one layer.

    $$H_{n,kd,k'd'} = \frac{\partial^2 \ell_n}{\partial W_{kd}\, \partial W_{k'd'}}$$

    with the loss \(\ell_n\) of sample \(n\), the model in eval mode, and the weight \(W\) of the layer. The Hessian of
    the mean loss is the mean over n. The call leaves the modes, gradients and buffers of the model and the random state
    of torch as they were.

    Args:
        model: network that maps a batch of one sample to its logits, shape (1, c). It may also return a mapping with
            the key `"logits"`, an object with the attribute `logits`, or a tuple or list that starts with them.
        layer: name of the layer, as in `model.named_modules()`.
        x: inputs, shape (n, ...).
        y: targets, shape (n, ...), as the loss takes them.
        loss: maps the logits (1, c) and the target (1, ...) of one sample to a scalar.

    Returns:
        Hessians, shape (n, k, d, k, d); loss per squared weight. The weights d of an output channel k have the order
        of `weight.flatten(1)`.

    Raises:
        ValueError: if `layer` does not name a layer with a weight matrix or kernel of its own.

    Example:
        >>> import torch
        >>> from lightning_flatness.oracle import layer_hessian
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3)).double()
        >>> layer_hessian(model, "0", torch.ones(5, 2).double(), torch.zeros(5).long()).shape
        torch.Size([5, 3, 2, 3, 2])
    """
    weight = _weight(model, layer)
    name = f"{layer}.weight" if layer else "weight"
    buffers = {key: value.detach().clone() for key, value in model.named_buffers()}
    rows = weight.shape[0]

    def sample_hessian(x_n: Tensor, y_n: Tensor) -> Tensor:
        def sample_loss(free_weight: Tensor) -> Tensor:
            free = {**buffers, name: free_weight.view_as(weight)}
            return loss(_logits(torch.func.functional_call(model, free, (x_n,))), y_n)

        return _hessian(sample_loss, weight.reshape(rows, -1))

    with _evaluation(model):
        return torch.stack([sample_hessian(x_n[None], y_n[None]) for x_n, y_n in zip(x, y, strict=True)])


def hessian_trace(
    model: nn.Module,
    layer: str,
    x: Tensor,
    y: Tensor,
    loss: Loss = nn.functional.cross_entropy,
) -> Tensor:
    r"""Return the trace of the layer's Hessian of each sample.

    $$\operatorname{Tr} H = \sum_{k,d} H_{kd,kd}$$

    with the Hessian \(H\), the arguments and the errors of `layer_hessian`.

    Returns:
        Traces, shape (n,); loss per squared weight.

    Example:
        >>> import torch
        >>> from lightning_flatness.oracle import hessian_trace
        >>> model = torch.nn.Linear(2, 2, bias=False).double()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> hessian_trace(model, "", torch.ones(1, 2).double(), torch.zeros(1).long())  # |x|^2 (1 - |S|^2)
        tensor([1.], dtype=torch.float64)
    """
    return torch.einsum("nkiki->n", layer_hessian(model, layer, x, y, loss))


def relative_flatness(
    model: nn.Module,
    layer: str,
    x: Tensor,
    y: Tensor,
    loss: Loss = nn.functional.cross_entropy,
) -> Tensor:
    r"""Return the relative flatness of the layer for each sample.

    $$\kappa = \sum_{k,k'} \langle W_k, W_{k'} \rangle \operatorname{Tr} H_{kk'}$$

    with the weights \(W_k\) of output channel \(k\), the block \(H_{kk'}\) of the Hessian between two output channels,
    and the arguments and the errors of `layer_hessian`.

    Source: Petzka et al., "Relative flatness and generalization", NeurIPS 2021, arXiv 2001.00939.

    Returns:
        Relative flatness, shape (n,); unit of the loss.

    Example:
        >>> import torch
        >>> from lightning_flatness.oracle import relative_flatness
        >>> model = torch.nn.Linear(2, 2, bias=False).double()
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> relative_flatness(model, "", torch.ones(1, 2).double(), torch.zeros(1).long())
        tensor([1.], dtype=torch.float64)
    """
    hessian = layer_hessian(model, layer, x, y, loss)
    weight = _weight(model, layer).flatten(1)
    return torch.einsum("kd,ld,nkili->n", weight, weight, hessian)


def _hessian(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Return the Hessian, shape (k, d, k, d), of a scalar function of the weight, shape (k, d)."""
    try:
        hessian: Tensor = torch.func.hessian(function)(weight)
    except RuntimeError:  # forward-over-reverse; a few operators have no forward-mode formula
        hessian = torch.func.jacrev(torch.func.jacrev(function))(weight)
    return hessian


def _weight(model: nn.Module, layer: str) -> Tensor:
    """Return the weight of the named layer, detached."""
    weights = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    matrices = {name: weight for name, weight in weights.items() if weight is not None and weight.ndim > 1}
    if layer not in matrices:
        raise ValueError(
            f"`layer` must name a layer with a weight matrix or kernel; got {layer!r}. Choose one of {list(matrices)}."
        )
    weight: Tensor = matrices[layer].detach()
    return weight


def _logits(output: Any) -> Tensor:
    """Return the logits from the output of the model."""
    if isinstance(output, Mapping):
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(output, Tensor)
    return output


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and restore the mode of every module and the random state of torch afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
