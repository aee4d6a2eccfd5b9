r"""Exact spectrum of a layer's mean Hessian: the matrices that have it, and numbers that sum it up.

The Hessian of a layer with \(K\) outputs of \(D\) weights has \(K D\) rows. Where each sample adds few columns, as
\(C - 1\) under cross-entropy, a matrix with one row per sample and column has the same non-zero eigenvalues.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_flatness.functional.gram import block_numel


def dual_matrix(directions: Float[Tensor, "n r k"], gradients: Float[Tensor, "n k d"]) -> Float[Tensor, "m m"]:
    r"""Return the inner products of the rows \(F_{nr} = (u_{nrk}\, a_{nk})_k\) of a factor of the Hessian.

    $$(F F^\top)_{nr,ms} = \sum_k u_{nrk}\, u_{msk}\, \langle a_{nk}, a_{mk} \rangle$$

    with the gradients \(a_{nk}\) of feature \(k\) of sample \(n\) with respect to the filter that feeds it, and the
    directions \(u_{nr}\), whose outer products are the sample's curvature in the features. \(F\) is never built.

    Args:
        directions: \(u\), shape (n, r, k).
        gradients: \(a\), shape (n, k, d).

    Returns:
        The matrix, shape (m, m) with m = n r, sample by sample. Divided by n, its eigenvalues are those of the mean
        Hessian.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import dual_matrix
        >>> dual_matrix(torch.ones(2, 1, 1), torch.tensor([[[3.0, 0.0]], [[1.0, 2.0]]]))
        tensor([[9., 3.],
                [3., 5.]])
    """
    n, columns, filters = directions.shape
    matrix = directions.new_empty(n, columns, n, columns)
    step = max(1, block_numel(directions) // max(1, n * columns * filters))
    by_filter, transposed = gradients.transpose(0, 1), directions.mT
    for start in range(0, n, step):
        block = slice(start, start + step)
        inner = (by_filter[:, block] @ by_filter.mT).permute(1, 2, 0)  # (block, n, k)
        scaled = directions[block].unsqueeze(1) * inner.unsqueeze(2)
        matrix[block] = (scaled @ transposed).transpose(1, 2)
    return matrix.reshape(n * columns, n * columns)


def primal_matrix(curvature: Float[Tensor, "n k k"], gradients: Float[Tensor, "n k d"]) -> Float[Tensor, "p p"]:
    r"""Return the sum of the samples' Hessians, without the curvature of the map from filters to features.

    $$\sum_n h_{nkk'}\, a_{nk}\, a_{nk'}^\top$$

    with the curvature \(h_n\) of a sample's loss in the features and the gradients \(a_{nk}\) of `dual_matrix`.

    Args:
        curvature: \(h\), shape (n, k, k).
        gradients: \(a\), shape (n, k, d).

    Returns:
        The matrix, shape (p, p) with p = k d, filter by filter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import primal_matrix
        >>> primal_matrix(torch.tensor([[[2.0]]]), torch.tensor([[[3.0, 1.0]]]))
        tensor([[18.,  6.],
                [ 6.,  2.]])
    """
    n, filters, weights = gradients.shape
    rows = []
    for k in range(filters):
        weighted = curvature[:, k].unsqueeze(-1) * gradients
        rows.append(gradients[:, k].mT @ weighted.reshape(n, filters * weights))
    return torch.cat(rows)


def patch_second_moments(weights: Float[Tensor, "n k s"], patches: Float[Tensor, "n g s d"]) -> Float[Tensor, "k d d"]:
    r"""Return what a curved activation adds to the diagonal blocks of the sum of the samples' Hessians.

    $$\sum_n \sum_s w_{nks}\, P_{ns} P_{ns}^\top$$

    with the patches \(P_{ns}\) of the filter's own group and \(w_{nks}\), the gradient of the loss in feature \(k\)
    times the second derivative of the feature in the convolution's output at position \(s\).

    Args:
        weights: \(w\), shape (n, k, s).
        patches: \(P\), shape (n, g, s, d), see the function `patches`.

    Returns:
        The blocks, shape (k, d, d).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import patch_second_moments
        >>> patch_second_moments(torch.tensor([[[3.0]]]), torch.tensor([[[[1.0, 2.0]]]]))
        tensor([[[ 3.,  6.],
                 [ 6., 12.]]])
    """
    n, groups, positions, size = patches.shape
    rows = patches.transpose(0, 1).reshape(groups, n * positions, size)
    scales = weights.transpose(0, 1).reshape(groups, -1, n * positions)  # (g, filters of the group, n s)
    blocks = [(rows.mT * scales[:, k].unsqueeze(1)) @ rows for k in range(scales.shape[1])]
    return torch.stack(blocks, 1).flatten(0, 1)


def signed_eigenvalues(gram: Float[Tensor, "m m"], signs: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    r"""Return the eigenvalues of \(F^\top \operatorname{diag}(\sigma) F\) from the inner products of its rows.

    They are those of \(\sqrt{D} \operatorname{diag}(\sigma) \sqrt{D}\) with \(D = F F^\top\), and of \(D\) itself where
    no sign is negative. The rest of the eigenvalues are zero.

    Args:
        gram: \(D\), shape (m, m).
        signs: \(\sigma\), each 1, 0 or -1, shape (m,).

    Returns:
        The eigenvalues in ascending order, shape (m,).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import signed_eigenvalues
        >>> signed_eigenvalues(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([-1.0, 1.0]))
        tensor([-4.,  1.])
    """
    if bool((signs == 1).all()):
        return torch.linalg.eigvalsh(gram)
    values, vectors = torch.linalg.eigh(gram)
    # What is zero up to rounding must not couple to the rest by the square root of the rounding.
    values = torch.where(not_zero(values), values, 0.0).clamp_min(0)
    root = (vectors * values.sqrt()) @ vectors.mT
    return torch.linalg.eigvalsh(root @ (signs.unsqueeze(1) * root))


def not_zero(eigenvalues: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
    r"""Return which eigenvalues differ from zero by more than rounding; their number is the numerical rank.

    $$\vert l_i \vert > m\, \epsilon\, l_{\max}$$

    Here \(m\) is the number of eigenvalues \(l_i\), \(\epsilon\) the spacing of floating-point numbers at 1 and
    \(l_{\max}\) the largest absolute value.

    Args:
        eigenvalues: \(l\), shape (m,).

    Returns:
        Whether each is not zero, shape (m,).

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import not_zero
        >>> not_zero(torch.tensor([2.0, -1.0, 1e-9]))
        tensor([ True,  True, False])
    """
    magnitudes = eigenvalues.abs()
    largest = magnitudes.max() if len(magnitudes) else 0.0
    return magnitudes > len(magnitudes) * torch.finfo(magnitudes.dtype).eps * largest


def soft_rank(eigenvalues: Float[Tensor, " m"], relative: float = 1e-3) -> Float[Tensor, ""]:
    r"""Return the number of eigenvalues, each counted by how far it stands out of a noise level.

    $$\operatorname{Tr}\, H (H + \lambda)^{-1} = \sum_i \frac{l_i}{l_i + \lambda}, \qquad \lambda = \rho\, l_{\max}$$

    with the level \(\rho\) relative to the largest eigenvalue \(l_{\max}\). Eigenvalues of zero add nothing, so the
    non-zero ones are enough. Also known as the effective dimensionality.

    Source: MacKay, Neural Computation 4 (1992).

    Args:
        eigenvalues: \(l\), not negative, shape (m,); negative ones are taken for rounding and count as zero.
        relative: \(\rho\).

    Returns:
        A scalar from 0 to m; 0 where all eigenvalues are zero.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import soft_rank
        >>> soft_rank(torch.tensor([1.0, 1e-3, 0.0]))
        tensor(1.4990)
    """
    values = eigenvalues.clamp_min(0)
    if not bool(values.any()):
        return values.new_zeros(())
    return (values / (values + relative * values.max())).sum()


def participation_ratio(trace: Float[Tensor, ""], frobenius_norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""Return the number of equal eigenvalues that would have the same trace and Frobenius norm.

    $$\frac{(\operatorname{Tr} H)^2}{\Vert H \Vert_F^2} = \frac{(\sum_i l_i)^2}{\sum_i l_i^2}
    \le \operatorname{rank} H$$

    with the eigenvalues \(l_i\).

    Args:
        trace: \(\operatorname{Tr} H\), a scalar.
        frobenius_norm: \(\Vert H \Vert_F\), a scalar.

    Returns:
        A scalar, at most the rank; 0 for the zero matrix.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import participation_ratio
        >>> participation_ratio(torch.tensor(4.0), torch.tensor(2.0))
        tensor(4.)
    """
    return torch.where(frobenius_norm == 0, 0.0, (trace / frobenius_norm).square())
