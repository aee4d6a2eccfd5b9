"""The rival of arXiv 2605.25674: Hutchinson's estimate of the Hessian trace of every layer, at each validation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from experiments.data import Images

PROBES = 5
"""Random directions; the paper recommends five to ten."""
IMAGES = 200
"""Training images that the loss is the mean of, always the same ones."""
MOST = 6
"""Layers of the largest network of `experiments.alerts`."""
KEYS = tuple(f"layer_trace/{number}" for number in range(MOST))


class LayerTraces(Callback):
    """Keeps the estimates after each validation, in `values`, by the names in `KEYS`.

    Args:
        images: the training images, with their labels at the time of the validation.
        seed: of the random directions.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.values = images, list[dict[str, float]]()
        self._generator = torch.Generator().manual_seed(seed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate; the module is in eval mode, and its gradients are not touched."""
        with torch.inference_mode(False), torch.enable_grad():
            found = layer_traces(pl_module, self.images, self._generator)
        self.values.append(dict(zip(KEYS, found, strict=False)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {"values": self.values, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.values = state_dict["values"]
        self._generator.set_state(state_dict["generator"])


def layer_traces(module: nn.Module, images: Images, generator: torch.Generator) -> list[float]:
    """Return for each layer an estimate of `tr H_l`, the mean of `v_l . (H v)_l` over random signs `v`.

    One product with the Hessian of all layers serves every layer: the blocks off the diagonal have the mean zero.

    Args:
        module: in eval mode.
        images: the first ones are used.
        generator: draws the signs.
    """
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    loss = F.cross_entropy(module(images.images[:IMAGES]), images.labels[:IMAGES])
    gradients, totals = torch.autograd.grad(loss, weights, create_graph=True), torch.zeros(len(weights))
    for _ in range(PROBES):
        signs = [torch.randint(2, weight.shape, generator=generator) * 2.0 - 1 for weight in weights]
        products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
        totals += torch.stack([(v * hv).sum() for v, hv in zip(signs, products, strict=True)])
    return (totals / PROBES).tolist()
