"""Margins between the true class and its strongest rival."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def output_margin(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], signed: bool = True) -> Float[Tensor, " n"]:
    r"""Return `gamma = phi_y - max_{j != y} phi_j`, the margin of the true class in the logits.

    Source: "On flat minima, large margins and generalizability" (its definition is the absolute value).

    Args:
        logits: unnormalised scores, shape (n, c), c >= 2.
        target: class indices, shape (n,).
        signed: negative where the sample is misclassified; False gives the absolute value.

    Returns:
        Margins, shape (n,); unit of the logits; higher is better.

    Example:
        >>> import torch
        >>> output_margin(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor([ 2., -2.])
    """
    index = target.unsqueeze(-1)
    rival = logits.scatter(-1, index, -torch.inf).amax(-1)
    margin = logits.gather(-1, index).squeeze(-1) - rival
    return margin if signed else margin.abs()
