"""Estimates and lower bounds of a curvature from few of its cotangents, and their errors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_flatness.functional.cotangents import competitor_cotangents, margin_cotangent


def sign_probe(cotangents: Float[Tensor, "n r c"], generator: torch.Generator | None = None) -> Float[Tensor, "n c"]:
    r"""Return the sum of each sample's cotangents with random signs: one backward pass instead of one for each.

    $$v = F^\top \sigma, \qquad \sigma \in \{-1, 1\}^r, \qquad
    \mathbb{E}\, \Vert J^\top v \Vert^2 = \operatorname{Tr} \bigl(J^\top F^\top F J\bigr)$$

    with the cotangents as rows of \(F\) and the Jacobian \(J\) of the logits. The signs are independent and new for
    each sample. The estimate is unbiased, also in any other inner product of weights; `sign_probe_variance` has its
    variance.

    Source: Hutchinson, Communications in Statistics 18 (1989).

    Args:
        cotangents: \(F\), shape (n, r, c), see `curvature_factor`.
        generator: of the signs, on the CPU; None: that of torch.

    Returns:
        \(v\), shape (n, c); unit of the cotangents.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import sign_probe
        >>> sign_probe(torch.tensor([[[2.0, 3.0]]])).abs()
        tensor([[2., 3.]])
    """
    signs = torch.randint(2, (*cotangents.shape[:2], 1), generator=generator, device="cpu").to(cotangents) * 2 - 1
    return (cotangents * signs).sum(1)


def two_pass_cotangents(
    logits: Float[Tensor, "n c"], target: Int[Tensor, " n"], generator: torch.Generator | None = None
) -> Float[Tensor, "n two c"]:
    r"""Return two cotangents that estimate a Gauss-Newton trace without bias: margin exactly, competitors by signs.

    $$\mathbb{E} \bigl( \Vert J^\top v \Vert^2 + \Vert J^\top M^\top \sigma \Vert^2 \bigr) =
    \operatorname{Tr} \bigl(J^\top B J\bigr)$$

    with \(v\) of `margin_cotangent`, \(M\) of `competitor_cotangents`, random signs \(\sigma\) and the softmax
    curvature \(B\). The more a network has learnt, the larger is the part of the margin, which has no error. With two
    classes there are no competitors, and the value is exact.

    Args:
        logits: unnormalised scores, shape (n, c) with c >= 2.
        target: class indices, shape (n,).
        generator: of the signs, on the CPU; None: that of torch.

    Returns:
        The two cotangents, shape (n, 2, c); square root of the loss per logit.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import two_pass_cotangents
        >>> cotangents = two_pass_cotangents(torch.zeros(1, 3), torch.tensor([0]))
        >>> cotangents.square().sum((1, 2))  # the trace of the curvature itself
        tensor([0.6667])
    """
    probe = sign_probe(competitor_cotangents(logits, target), generator)
    return torch.stack([margin_cotangent(logits, target), probe], 1)


def longest_first(cotangents: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    r"""Return the cotangents of each sample in the order of their length, the longest first.

    As every cotangent adds a value that is not negative, the first of them alone give a lower bound for every sample:

    $$\sum_{j \le k} \Vert J^\top F_j \Vert^2 \;\le\; \operatorname{Tr} \bigl(J^\top F^\top F J\bigr)$$

    With signs on the others (`sign_probe`) the value is unbiased again. No upper bound follows from the lengths: it
    needs one of the Jacobian \(J\).

    Args:
        cotangents: \(F\), shape (n, r, c), see `curvature_factor`.

    Returns:
        The same cotangents, shape (n, r, c).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import longest_first
        >>> longest_first(torch.tensor([[[1.0], [-3.0], [2.0]]])).flatten()
        tensor([-3.,  2.,  1.])
    """
    order: Int[Tensor, "n r"] = cotangents.square().sum(-1).argsort(-1, descending=True)
    return cotangents.gather(1, order.unsqueeze(-1).expand_as(cotangents))


def sign_probe_variance(gram: Float[Tensor, "n r r"]) -> Float[Tensor, " n"]:
    r"""Return the variance of each sample's estimate by `sign_probe`.

    $$\operatorname{Var}\, \Vert J^\top F^\top \sigma \Vert^2 = 2 \sum_{a \ne b} A_{ab}^2, \qquad
    A = F J J^\top F^\top$$

    The batch mean of \(N\) samples has the variance \(N^{-2}\) times the sum of these. The formula needs all
    cotangents, so it is for judging an estimate; `standard_error` needs the estimates alone.

    Args:
        gram: \(A\), inner products of the pulled-back cotangents, shape (n, r, r).

    Returns:
        Variances, shape (n,); squared unit of the estimate.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import sign_probe_variance
        >>> sign_probe_variance(torch.tensor([[[5.0, 1.0], [1.0, 2.0]]]))
        tensor([4.])
    """
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    return 2 * off.square().sum((1, 2))


def standard_error(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Return an upper estimate of the standard error of the mean of unbiased per-sample estimates.

    $$\frac{1}{\sqrt N} \Bigl( \frac{1}{N - 1} \sum_n (t_n - \bar t)^2 \Bigr)^{1/2}$$

    with the estimates \(t_n\), their mean \(\bar t\) and their number \(N\). It holds two parts: what the random signs
    add, and how much the samples' exact values differ. It is therefore the error as an estimate for the distribution
    that the samples come from. The error as an estimate for these very samples is smaller.

    Args:
        values: \(t\), shape (n,).

    Returns:
        A scalar in the unit of the values; NaN for fewer than two.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import standard_error
        >>> standard_error(torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    if len(values) < 2:
        return values.new_tensor(torch.nan)
    return values.std() / len(values) ** 0.5
