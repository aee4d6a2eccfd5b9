"""The same numbers from their definitions, with the full Hessian in memory: slow, obvious, independent.

Nothing here knows about tails, patches or curvature of the softmax, and nothing is shared with the fast path:
`torch.func` differentiates the loss of one sample twice with respect to one weight, and the definitions are
applied to what comes out. Meant for tiny networks in float64, in tests and in the documentation. A Hessian
has (K D)^2 entries per sample, K output channels with D weights each.

Lower is flatter for every quantity here.
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
    """Full Hessian of every sample's own loss with respect to the weight of one layer.

    H[n, k, i, l, j] = d2 loss(model(x_n), y_n) / d W_ki d W_lj, with the model in eval mode. The Hessian of
    the mean loss of a batch is the mean over n. The model is left as it was: modes, gradients, buffers and
    torch's random state.

    Args:
        model: Network whose output is the logits (1, C) of a batch of one, or a mapping with the key
            `"logits"`, an object with that attribute, or a tuple or list that starts with them.
        layer: Dotted name of the layer, as in `model.named_modules()`.
        x: Inputs (n, ...).
        y: Targets (n, ...), as `loss` takes them.
        loss: Maps the logits (1, C) and the target (1, ...) of one sample to a scalar.

    Returns:
        Hessians (n, K, D, K, D): K output channels, D weights per output channel in the order of
        `weight.flatten(1)`.

    Raises:
        ValueError: `layer` does not name a layer with a weight matrix or kernel of its own.

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
    """Trace of every sample's layer Hessian.

    Tr H = sum_{k, i} H[k, i, k, i].

    Args:
        model: Network, as for `layer_hessian`.
        layer: Dotted name of the layer.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        loss: Maps logits and target of one sample to a scalar.

    Returns:
        Traces (n,).

    Raises:
        ValueError: `layer` does not name a layer with a weight of its own.

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
    """Relative flatness of every sample, from its definition.

    kappa = sum_{k, l} <W_k, W_l> Tr H_kl, where H_kl is the (D, D) block of the Hessian between the weights
    of output channels k and l. Source: Petzka et al., "Relative flatness and generalization", NeurIPS 2021.

    Args:
        model: Network, as for `layer_hessian`.
        layer: Dotted name of the layer.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        loss: Maps logits and target of one sample to a scalar.

    Returns:
        Relative flatness (n,).

    Raises:
        ValueError: `layer` does not name a layer with a weight of its own.

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
    """Hessian (K, D, K, D) of a scalar function of the weight (K, D)."""
    try:
        hessian: Tensor = torch.func.hessian(function)(weight)
    except RuntimeError:  # torch.func.hessian is forward-over-reverse: a few operators have no formula for it
        hessian = torch.func.jacrev(torch.func.jacrev(function))(weight)
    return hessian


def _weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of the named layer, detached."""
    weights = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    matrices = {name: weight for name, weight in weights.items() if weight is not None and weight.ndim > 1}
    if layer not in matrices:
        raise ValueError(
            f"`layer` must name a layer with a weight matrix or kernel: got {layer!r}. Choose one of {list(matrices)}."
        )
    weight: Tensor = matrices[layer].detach()
    return weight


def _logits(output: Any) -> Tensor:
    """The logits in what the model returned."""
    if isinstance(output, Mapping):
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(output, Tensor)
    return output


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode and torch's random state as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
