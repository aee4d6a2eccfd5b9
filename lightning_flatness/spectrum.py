"""The eigenvalues of a layer's Hessian on batches of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_flatness.curvature.eigenvalues import MeanHessian, eigenvalues
from lightning_flatness.curvature.jacobian.mean_hessian import GradientHessian, LayerGradients
from lightning_flatness.curvature.jacobian.method import Curvature, JacobianMethod
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives
from lightning_flatness.curvature.pooled.mean_hessian import PooledHessian
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.data.batches import require_batches
from lightning_flatness.data.passes import ASSUMED, measured_batches, preserved_state
from lightning_flatness.errors import UnsupportedTailError, require_counts, require_optional_counts
from lightning_flatness.functional import not_zero, participation_ratio, soft_rank
from lightning_flatness.losses import Loss, as_loss
from lightning_flatness.recording.layers import refuse_programs
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder
from lightning_flatness.reporting.figures import eigenvalue_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVATURES: dict[Curvature, str] = {"hessian": "Hessian", "ggn": "Gauss-Newton part of the Hessian"}


@dataclass(frozen=True)
class LayerSpectrum:
    """The eigenvalues of the mean Hessian of one layer, and what follows from them.

    Attributes:
        layer: name of the layer.
        n_samples: number of samples.
        n_weights: number of the layer's weights, `k d`, and so of all its eigenvalues.
        eigenvalues: in descending order, float64, shape (m,); loss per squared weight. Those that are left out are
            zero, unless `matrix` is `"leading"`.
        matrix: what they were computed from: `"dual"` with a row for each sample and class, `"primal"` with a row for
            each weight, or `"leading"`: the largest eigenvalues alone, by products with vectors.
        trace: sum of all eigenvalues, from the samples' traces; loss per squared weight.
        rank_bound: an upper bound of the rank, see `functional.rank_bound`. It is `n_weights` where the activation is
            curved, such as SiLU.
        soft_rank: see `functional.soft_rank`, with a noise level of 1e-3 of the largest eigenvalue. Where the Hessian
            has negative eigenvalues, it is that of its Gauss-Newton part; None where this has some as well, and for
            `"leading"`.
        method: `"pooled"`, the closed form under global pooling, or `"jacobian"`, gradients of every sample and class.
        curvature: `"hessian"`; `"ggn"`, the Gauss-Newton part of the Hessian: for `"jacobian"` where the network is not
            known to be piecewise linear behind the layer, for `"pooled"` where the head is curved and large.
        assumed: what was assumed instead of proved, in words.

    Example:
        >>> import torch
        >>> from lightning_flatness import LayerSpectrum
        >>> values = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
        >>> spectrum = LayerSpectrum("conv", 10, 3, values, "primal", trace=4.0, rank_bound=3, soft_rank=2.0)
        >>> spectrum.spectral_norm, spectrum.numerical_rank, round(spectrum.participation, 3)
        (3.0, 2, 1.6)
    """

    layer: str
    n_samples: int
    n_weights: int
    eigenvalues: Tensor
    matrix: Literal["dual", "primal", "leading"]
    trace: float
    rank_bound: int
    soft_rank: float | None
    method: Literal["pooled", "jacobian"] = "pooled"
    curvature: Curvature = "hessian"
    assumed: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether all eigenvalues are known."""
        return self.matrix != "leading"

    @property
    def spectral_norm(self) -> float:
        """Largest absolute eigenvalue; loss per squared weight."""
        return float(self.eigenvalues.abs().max())

    @property
    def frobenius_norm(self) -> float | None:
        """Root of the sum of squared eigenvalues; loss per squared weight. None unless all are known."""
        return float(self.eigenvalues.square().sum().sqrt()) if self.is_complete else None

    @property
    def numerical_rank(self) -> int | None:
        """Number of eigenvalues that are not zero, see `functional.not_zero`; None unless all are known."""
        return int(not_zero(self.eigenvalues).sum()) if self.is_complete else None

    @property
    def participation(self) -> float | None:
        """Number of equal eigenvalues with the same trace and Frobenius norm, see `functional.participation_ratio`."""
        if (norm := self.frobenius_norm) is None:
            return None
        return float(participation_ratio(*torch.tensor([self.trace, norm], dtype=torch.float64)))

    def to_dict(self) -> dict[str, Any]:
        """Return fields and properties as plain Python types, the eigenvalues as a list."""
        derived = ("spectral_norm", "frobenius_norm", "numerical_rank", "participation")
        names = [field.name for field in fields(self)] + list(derived)
        return {name: getattr(self, name) for name in names} | {"eigenvalues": self.eigenvalues.tolist()}

    def __str__(self) -> str:
        """Return the spectrum as a table."""
        rows = [
            ("layer", self.layer),
            ("method", f"{self.method}: {_CURVATURES[self.curvature]}"),
            ("samples", f"{self.n_samples}"),
            ("weights", f"{self.n_weights}"),
            ("eigenvalues", f"{len(self.eigenvalues)} ({self.matrix})"),
            ("trace", f"{self.trace:.6g}  (lower is flatter)"),
            ("spectral norm", f"{self.spectral_norm:.6g}  (lower is flatter)"),
            ("Frobenius norm", _text(self.frobenius_norm, "  (lower is flatter)")),
            ("numerical rank", _text(self.numerical_rank, f"  (at most {self.rank_bound})")),
            ("soft rank", _text(self.soft_rank)),
            ("participation", _text(self.participation)),
            *(("assumed", what) for what in self.assumed),
        ]
        return "\n".join(f"{name:<22}{value}" for name, value in rows)

    def plot(self) -> Figure:
        """Return the density of the eigenvalues, see `reporting.figures.eigenvalue_density`.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        shown = self.eigenvalues[not_zero(self.eigenvalues)]
        rest = f"{self.n_weights - len(shown)} of {self.n_weights} are {'zero' if self.is_complete else 'unknown'}"
        return eigenvalue_density(shown.tolist(), f"Spectrum of {self.layer}: {_CURVATURES[self.curvature]}", rest)


def spectrum(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str | None = None,
    classifier: str | None = None,
    method: Literal["auto", "pooled", "jacobian"] = "auto",
    max_samples: int | None = None,
    target: Callable[[Any], Tensor] | None = None,
    loss: str | nn.Module | Loss | Callable[[Any, Any], Tensor] | None = None,
    dense_size: int = 5000,
    leading: int = 20,
) -> LayerSpectrum:
    """Return the eigenvalues of a layer's mean Hessian.

    All of them are computed, exactly: from the matrix of inner products between samples and classes, or from the
    Hessian itself, whichever is smaller. Where both have more than `dense_size` rows, the leading eigenvalues are
    computed by products of the Hessian with vectors, which needs scipy.

    The model is evaluated as in `measure`, and left as it was.

    Args:
        model: any module; it is called with the inputs of each batch.
        batches: an iterable of (inputs, targets), such as a `DataLoader`.
        layer: name of a convolution or a linear layer; None: the deepest convolution.
        classifier: name of the linear classifier behind a pooled convolution; None: found.
        method: `"pooled"`: the closed form of a convolution under global pooling. `"jacobian"`: the gradients of every
            sample and class for the named layer, in any network; they are in memory at once. `"auto"`: the first if it
            is exact, else the second if a layer is named.
        max_samples: stop after so many samples; None: all. Memory grows with the samples.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: the training loss, as for `measure`. None: cross-entropy, and the spectrum says that it is assumed.
        dense_size: rows of the largest matrix whose eigenvalues are all computed. Its memory grows with the square,
            its time with the third power: 5000 rows take 200 MB and are decomposed in about 5 s on one core.
        leading: how many eigenvalues to compute of larger ones, the largest by absolute value.

    Returns:
        The spectrum; `print` it, read its attributes, or `plot` it.

    Raises:
        UnsupportedTailError: if no method can measure this layer of this model; the message has the path and step.
        NonFiniteError: if the logits hold NaN.
        ModuleNotFoundError: if the matrices are too large and scipy is not installed.
        ValueError: if a name, a batch or a target is not what it must be.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatness import spectrum
        >>> tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), *tail)
        >>> found = spectrum(network, [(torch.randn(5, 1, 6, 6), torch.zeros(5).long())])
        >>> found.layer, found.n_weights, len(found.eigenvalues), found.rank_bound
        ('0', 36, 10, 10)
    """
    require_batches(batches, "batches")
    require_counts(dense_size=dense_size, leading=leading)
    require_optional_counts(max_samples=max_samples)
    if method not in ("auto", "pooled", "jacobian"):
        raise ValueError(f"`method` must be 'auto', 'pooled' or 'jacobian'; got {method!r}.")
    if layer is None and method == "jacobian":
        raise ValueError("`layer` must name a layer for the method 'jacobian'; got None.")
    refuse_programs(model)
    if method == "auto" and layer is not None and iter(batches) is batches:
        batches = list(batches)  # both methods may have to read them
    data = _Data(model, batches, max_samples, target, None if loss is None else as_loss(loss))
    found = _found(data, layer, classifier, method)
    values, matrix = eigenvalues(found.hessian, dense_size, leading)
    return LayerSpectrum(
        layer=found.layer,
        n_samples=found.hessian.samples,
        n_weights=found.hessian.size,
        eigenvalues=values.cpu(),
        matrix=matrix,
        trace=found.trace,
        rank_bound=found.hessian.rank_bound,
        soft_rank=None if matrix == "leading" else _soft_rank(found.hessian, values, dense_size),
        method=found.method,
        curvature=found.curvature,
        assumed=(ASSUMED,) if loss is None else (),
    )


class _LayerHessian(MeanHessian, Protocol):
    """A mean Hessian with what else is reported of it."""

    samples: int

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank."""

    def gauss_newton(self) -> MeanHessian:
        """Return its Gauss-Newton part."""


class _Found(NamedTuple):
    """The mean Hessian of a layer, and what is known of it."""

    hessian: _LayerHessian
    trace: float
    layer: str
    method: Literal["pooled", "jacobian"]
    curvature: Curvature = "hessian"


class _Data(NamedTuple):
    """What is measured."""

    model: nn.Module
    batches: Iterable[Any]
    max_samples: int | None
    target: Callable[[Any], Tensor] | None
    loss: Loss | Callable[[Any, Any], Tensor] | None

    def measured(self, recorder: ForwardRecorder, method: Any) -> list[Any]:
        """Return what the method has for the samples, in order."""
        with preserved_state(self.model):
            parts = [part for part in measured_batches(recorder, method, *self) if len(part)]
        if not parts:
            raise ValueError(
                "`batches` must yield at least one sample; got none. If it is a generator, make a new one: it can be "
                "read only once."
            )
        return parts


def _found(data: _Data, layer: str | None, classifier: str | None, method: str) -> _Found:
    """Return the mean Hessian of the layer by the method that measures it."""
    if method == "pooled" or layer is None:
        return _pooled(data, layer, classifier)
    if method == "auto" and not isinstance(dict(data.model.named_modules()).get(layer), nn.Linear):
        try:
            return _pooled(data, layer, classifier)
        except UnsupportedTailError:
            pass  # by gradients
    return _by_gradients(data, layer)


def _pooled(data: _Data, layer: str | None, classifier: str | None) -> _Found:
    recorder, method = ForwardRecorder(data.model, layer, classifier), _KeptDerivatives()
    measured: list[SampleQuantities] = data.measured(recorder, method)
    trace = torch.cat([quantities.hessian_trace for quantities in measured]).double().mean()
    hessian = PooledHessian([part for part in method.parts if len(part)])
    return _Found(hessian, float(trace), str(recorder.layer), "pooled", _common(measured))


def _by_gradients(data: _Data, layer: str) -> _Found:
    parts: list[LayerGradients] = data.measured(LayersRecorder(data.model, (layer,)), _Gradients(layer))
    hessian = GradientHessian(parts)
    return _Found(hessian, hessian.trace, layer, "jacobian", _common(parts))


def _common(parts: Sequence[SampleQuantities | LayerGradients]) -> Curvature:
    return "ggn" if any(part.curvature == "ggn" for part in parts) else "hessian"


class _Gradients(NamedTuple):
    """The gradients of a layer in the place of quantities."""

    layer: str

    def quantities(self, recorded: RecordedLayers, samples: slice) -> LayerGradients:
        return JacobianMethod().gradients(recorded, self.layer, samples)


class _KeptDerivatives(PooledMethod):
    """The pooled method, which keeps the derivatives of every batch that it measures."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[PooledDerivatives] = []

    def derivatives(self, recorded: RecordedPass, samples: slice = slice(None)) -> PooledDerivatives:
        self.parts.append(super().derivatives(recorded, samples))
        return self.parts[-1]


def _soft_rank(hessian: _LayerHessian, values: Tensor, dense_size: int) -> float | None:
    """Return the soft rank of the Hessian if it is positive, else of its Gauss-Newton part if that is."""
    if bool((values[not_zero(values)] < 0).any()):
        values, matrix = eigenvalues(hessian.gauss_newton(), dense_size, 1)
        if matrix == "leading" or bool((values[not_zero(values)] < 0).any()):
            return None
    return float(soft_rank(values))


def _text(value: float | None, note: str = "") -> str:
    return "unknown" if value is None else f"{value:.6g}{note}"
