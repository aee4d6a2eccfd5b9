"""Eigenvalues of a layer's mean Hessian, from the smallest matrix that has them."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.errors import missing_package
from lightning_flatness.functional import signed_eigenvalues
from lightning_flatness.precision import full_precision


@runtime_checkable
class MeanHessian(Protocol):
    """The mean Hessian of one layer, in float64, as a method knows it."""

    @property
    def size(self) -> int:
        """Number of the layer's weights, `k d`."""

    @property
    def dual_size(self) -> int | None:
        """Number of rows of `dual`; None if there is no such matrix."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def dual(self) -> tuple[Float[Tensor, "m m"], Float[Tensor, " m"]]:
        """Return the inner products of the rows of its factor, and the sign of each row."""

    def primal(self) -> Float[Tensor, "p p"]:
        """Return the Hessian itself."""

    def product(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the Hessian times a vector."""


class Eigenvalues(NamedTuple):
    """Eigenvalues of a mean Hessian.

    Attributes:
        values: in descending order, shape (m,); those that are left out are zero, unless the matrix is `"leading"`.
        matrix: where they come from: `"dual"`, `"primal"`, or the largest ones alone (`"leading"`).
    """

    values: Float[Tensor, " m"]
    matrix: Literal["dual", "primal", "leading"]


def eigenvalues(hessian: MeanHessian, dense_size: int, leading: int) -> Eigenvalues:
    """Return the eigenvalues from the smaller of dual and primal matrix; the leading ones where both are too large.

    Args:
        hessian: the mean Hessian of a layer.
        dense_size: rows of the largest matrix that is decomposed as a whole.
        leading: how many eigenvalues to compute where both are larger: the largest by absolute value.

    Raises:
        ModuleNotFoundError: if both are too large and scipy is not installed.
    """
    dual, primal = hessian.dual_size, hessian.size
    with full_precision(hessian.device):
        if min(primal, dual or primal) > dense_size:
            return Eigenvalues(_leading(hessian, leading), "leading")
        if dual is not None and dual <= primal:
            return Eigenvalues(signed_eigenvalues(*hessian.dual()).flip(0), "dual")
        return Eigenvalues(torch.linalg.eigvalsh(hessian.primal()).flip(0), "primal")


def _leading(hessian: MeanHessian, count: int) -> Float[Tensor, " m"]:
    """Return the eigenvalues that are largest by absolute value, by Lanczos iteration."""
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ModuleNotFoundError as error:
        raise missing_package("The spectrum of a layer this large", "scipy") from error
    size = hessian.size

    def product(vector):  # type: ignore[no-untyped-def]  # arrays of numpy
        moved = torch.from_numpy(vector.reshape(-1)).to(hessian.device)
        return hessian.product(moved).cpu().numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    operator = LinearOperator((size, size), matvec=product, dtype=start.dtype)
    values = eigsh(operator, k=min(count, size - 1), which="LM", v0=start, return_eigenvectors=False)
    return torch.from_numpy(values).sort(descending=True).values
