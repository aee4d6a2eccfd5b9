"""Hessian trace and relative flatness per sample, in closed form, and the factors of relative flatness."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.functional.curvature import confidence, curvature_diagonal, probabilities_at
from lightning_flatness.functional.gram import HadamardGram
from lightning_flatness.functional.patches import ConvGeometry, patches


def hessian_trace(
    filter_squared_norm: Float[Tensor, "n k"], curvature_diagonal: Float[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    r"""Return the Hessian trace of a convolution's filters under global pooling.

    $$\operatorname{Tr} H = \sum_k R_{kk} Q_{kk}$$

    with \(R_{kk} = \Vert a_k \Vert^2\), the squared norm of the gradient of a feature with respect to the filter that
    feeds it (see `gram_factors`), and \(Q = V^\top B V\), the curvature \(B\) of the loss pulled back through the
    classifier \(V\). A curved activation adds a label term, which is not included here. If filters feed several
    features, the trace also has the terms \(2 R_{ff'} Q_{ff'}\) of every pair of features of one filter.

    Source: Taleghani, Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        filter_squared_norm: \(R_{kk}\), shape (n, k), see `HadamardGram.squared_norms`.
        curvature_diagonal: \(Q_{kk}\), shape (n, k): of the feature that filter k feeds, see the function
            `curvature_diagonal`.

    Returns:
        The trace, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import hessian_trace
        >>> hessian_trace(torch.tensor([[4.0, 1.0]]), torch.tensor([[0.5, 3.0]]))
        tensor([5.])
    """
    return (filter_squared_norm * curvature_diagonal).sum(-1)


def relative_flatness(
    logits: Float[Tensor, "n c t"], rows: Float[Tensor, "n c k"], gram: HadamardGram
) -> Float[Tensor, "n t"]:
    r"""Return relative flatness of a convolution's filters under cross-entropy and global pooling.

    $$\kappa = \sum_{k,k'} \langle W_k, W_{k'} \rangle \operatorname{Tr} H_{kk'}
    = \operatorname{Tr} \bigl(B V G V^\top\bigr), \qquad G = (W W^\top) \circ R$$

    with the filters \(W_k\), the blocks \(H_{kk'}\) of the Hessian between two filters, whose trace is
    \(R_{kk'} Q_{kk'}\), the curvature \(B = \operatorname{diag}(S) - S S^\top\) and the classifier's weight \(V\). It
    is the variance, in the inner product \(G\), of the classifier's row of a class that is drawn from the softmax
    \(S\). The variance follows from the distances between all pairs of rows, or from the rows and their mean at every
    temperature; the way with fewer multiply-adds is taken. Rescaling a filter and undoing it in the next layer
    changes the trace but not relative flatness.

    Source: Petzka et al., NeurIPS 2021, arXiv 2001.00939; for convolutions under global average pooling Taleghani,
    Mohammadi, Marchetti, arXiv 2603.09016.

    Args:
        logits: unnormalised scores at one or several temperatures, shape (n, c, t).
        rows: rows of the classifier, with a column for each filter, shape (n, c, k), see `centred_rows`.
        gram: \(G\).

    Returns:
        Relative flatness, shape (n, t); unit of the loss; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import HadamardGram, centred_rows, relative_flatness
        >>> logits, head = torch.zeros(1, 2), torch.tensor([[2.0], [0.0]])
        >>> gram = HadamardGram(torch.tensor([[3.0]]), left=torch.ones(1, 1, 1), right=torch.ones(1, 1, 1))
        >>> relative_flatness(logits.unsqueeze(-1), centred_rows(logits, head), gram)
        tensor([[3.]])
    """
    probabilities = probabilities_at(logits)
    (classes, temperatures), filters = probabilities.shape[1:], rows.shape[-1]
    if pairs_pay(classes, filters, temperatures):
        products = gram.inner_products(rows)
        squares = products.diagonal(dim1=1, dim2=2)
        distances = squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * products
        return (distances @ probabilities).mul_(probabilities).sum(1) / 2
    squares = gram.quadratic_forms(torch.cat([rows, probabilities.mT @ rows], 1))
    return (probabilities * squares[:, :classes, None]).sum(1) - squares[:, classes:]


def channelwise_relative_flatness(
    kernel: Float[Tensor, "k i ..."],
    inputs: Float[Tensor, "n channels ..."],
    jacobian: Float[Tensor, "n k s"],
    curvature: Float[Tensor, "n k k"],
    geometry: ConvGeometry,
) -> Float[Tensor, " n"]:
    r"""Return the sum of the relative flatness of a convolution's input channels, each taken as a layer of its own.

    $$\kappa_{\text{ch}} = \sum_i \sum_{k,k'} \langle W_{ki}, W_{k'i} \rangle \operatorname{Tr} H_{ki,k'i}
    = \sum_i \sum_{k,k'} \langle W_{ki}, W_{k'i} \rangle \langle a_{ki}, a_{k'i} \rangle\, Q_{kk'}$$

    with the weights \(W_{ki}\) by which filter \(k\) reads input channel \(i\), the block \(H_{ki,k'i}\) of the Hessian
    between two of them, the part \(a_{ki}\) of the gradient \(a_k\) of `gram_factors` and the curvature \(Q\) of the
    loss with respect to the features. Rescaling an input channel and undoing it in the layer before changes
    `relative_flatness` but not this value. Rescaling a filter and undoing it in the next layer changes neither. With
    one input channel both are the same. A curved activation adds a label term, which is not included here.

    Args:
        kernel: weight of the convolution as the module has it, shape (k, i, *kernel).
        inputs: input of the convolution, shape (n, channels, *space).
        jacobian: derivatives of the features in the convolution's output, shape (n, k, s), see `gram_factors`.
        curvature: \(Q\) of the features that the filters feed, shape (n, k, k).
        geometry: geometry of the convolution.

    Returns:
        Channel-wise relative flatness, shape (n,); unit of the loss; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import ConvGeometry, channelwise_relative_flatness
        >>> kernel = torch.tensor([[[1.0], [10.0]]])  # one filter, two input channels
        >>> inputs, one = torch.tensor([[[1.0], [0.1]]]), torch.ones(1, 1, 1)
        >>> geometry = ConvGeometry.of(torch.nn.Conv1d(2, 1, 1))
        >>> channelwise_relative_flatness(kernel, inputs, one, curvature=one, geometry=geometry)
        tensor([2.])
    """
    groups = geometry.groups
    weights = kernel.flatten(2).unflatten(0, (groups, -1))
    seen = patches(inputs, geometry).unflatten(-1, weights.shape[2:])
    gradients = torch.einsum("ngks,ngsid->ngkid", jacobian.unflatten(1, (groups, -1)), seen)
    total = curvature.new_zeros(len(curvature))
    for group, filters in enumerate(torch.arange(len(kernel)).chunk(groups)):
        within = curvature[:, filters[:, None], filters]
        for channel in range(weights.shape[2]):
            rows, parts = weights[group, :, channel], gradients[:, group, :, channel]
            total += (rows @ rows.mT * (parts @ parts.mT) * within).sum((1, 2))
    return total


def pairs_pay(classes: int, filters: int, temperatures: int) -> bool:
    """Return whether `relative_flatness` needs fewer multiply-adds from pairs of rows than from rows and means."""
    return classes**2 * (filters + temperatures) < temperatures * filters * (classes + filters)


def affine_trace(features: Float[Tensor, "n j"], curvature_trace: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""Return the Hessian trace of an affine layer, weight and bias, from the trace of the loss's curvature.

    $$\operatorname{Tr} H = (\Vert x \Vert^2 + 1) \operatorname{Tr} B$$

    with the layer's input \(x\) and the curvature \(B\) of any loss with respect to the layer's output. The 1 belongs
    to the bias. An upper bound of \(\operatorname{Tr} B\) gives an upper bound of the Hessian trace.

    Args:
        features: \(x\), shape (n, j).
        curvature_trace: \(\operatorname{Tr} B\), shape (n,), as in `losses.CrossEntropy.curvature_trace`.

    Returns:
        The trace, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import affine_trace
        >>> affine_trace(torch.tensor([[2.0]]), torch.tensor([0.5]))
        tensor([2.5000])
    """
    return (features.square().sum(-1) + 1) * curvature_trace


def linear_relative_flatness(
    features: Float[Tensor, "n j"], curvature_diagonal: Float[Tensor, "n j"]
) -> Float[Tensor, " n"]:
    r"""Return relative flatness of a linear layer from the curvature of the loss, pulled back through its weight.

    $$\kappa = \Vert x \Vert^2 \sum_j Q_{jj}, \qquad Q = V^\top B V$$

    with the layer's input \(x\), its weight \(V\) and the curvature \(B\) of any loss with respect to its output. The
    bias does not contribute.

    Source: Petzka et al., NeurIPS 2021, arXiv 2001.00939.

    Args:
        features: \(x\), shape (n, j).
        curvature_diagonal: \(Q_{jj}\), shape (n, j), as in `losses.CrossEntropy.curvature_diagonal`.

    Returns:
        Relative flatness, shape (n,); unit of the loss; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import linear_relative_flatness
        >>> linear_relative_flatness(torch.ones(1, 2), torch.tensor([[2.0, 0.5]]))
        tensor([5.])
    """
    return features.square().sum(-1) * curvature_diagonal.sum(-1)


def affine_hessian_trace(features: Float[Tensor, "n j"], logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    r"""Return the Hessian trace of an affine classifier under cross-entropy (ACEHT).

    $$\operatorname{Tr} H = (\Vert x \Vert^2 + 1)(1 - \Vert S \Vert^2)$$

    with the classifier's own input \(x\) and the softmax \(S\) of its output: `affine_trace` with the trace
    `confidence` of the softmax curvature.

    Source: "On flat minima, large margins and generalizability", submission to ICLR 2021.

    Args:
        features: \(x\), shape (n, j).
        logits: output of the classifier, shape (n, c).

    Returns:
        The trace over weight and bias, shape (n,); loss per squared weight; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import affine_hessian_trace
        >>> affine_hessian_trace(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.5000])
    """
    return affine_trace(features, confidence(logits))


def head_relative_flatness(
    features: Float[Tensor, "n j"], logits: Float[Tensor, "n c"], weight: Float[Tensor, "c j"]
) -> Float[Tensor, " n"]:
    r"""Return relative flatness of the linear classifier under cross-entropy.

    $$\kappa = \Vert x \Vert^2 \Bigl(\sum_c S_c \Vert V_c \Vert^2 - \Vert V^\top S \Vert^2\Bigr)$$

    with the classifier's own input \(x\), its weight \(V\) with rows \(V_c\) and the softmax \(S\) of its output. It is
    computed without cancellation, as `linear_relative_flatness` with the diagonal `curvature_diagonal`.

    Source: Petzka et al., NeurIPS 2021, arXiv 2001.00939; "On flat minima, large margins and generalizability",
    submission to ICLR 2021.

    Args:
        features: \(x\), shape (n, j).
        logits: output of the classifier, shape (n, c).
        weight: \(V\), shape (c, j).

    Returns:
        Relative flatness, shape (n,); unit of the loss; lower is flatter.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import head_relative_flatness
        >>> head_relative_flatness(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor([4.5000])
    """
    return linear_relative_flatness(features, curvature_diagonal(logits, weight))


def attribution(
    relative: Float[Tensor, ""],
    confidence: Float[Tensor, ""],
    head: Float[Tensor, ""],
    kernel: Float[Tensor, ""],
    features: Float[Tensor, ""],
) -> dict[str, Tensor]:
    r"""Return the five factors whose product is mean relative flatness.

    $$\kappa = c\, v\, w\, r\, g$$

    with the factors described below, whose letters are no axes here. The change of \(\log \kappa\) since a reference is
    the sum of the changes of the five logarithms. The label term of a curved activation is part of \(\kappa\) and
    therefore of \(g\). This term can make \(\kappa\) and \(g\) negative. The product still holds, but neither has a
    logarithm.

    Args:
        relative: \(\kappa\), mean relative flatness.
        confidence: \(c\), mean trace of the loss's curvature with respect to the logits, see the function `confidence`.
        head: \(v = \Vert V \Vert_F^2\), squared norm of the classifier's weight.
        kernel: \(w = \Vert W \Vert_F^2\), squared norm of the convolution's filters.
        features: \(r\), mean of \(\operatorname{Tr} R\), the squared norm of the features' gradients with respect to
            the filters.

    Returns:
        The four given factors under their names, and `alignment`, \(g = \kappa / (c v w r)\), without unit. It is 0
        where one of the other factors is 0.

    Example:
        >>> import torch
        >>> from lightning_flatness.functional import attribution
        >>> attribution(*map(torch.tensor, (6.0, 0.5, 2.0, 3.0, 4.0)))["alignment"]
        tensor(0.5000)
    """
    size = confidence * head * kernel * features
    alignment = torch.where(size == 0, 0.0, relative / size)
    return {
        "confidence": confidence,
        "head": head,
        "kernel": kernel,
        "features": features,
        "alignment": alignment,
    }
