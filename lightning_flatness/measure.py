"""Measures a model on batches of data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lightning_flatness.curvature.jacobian.method import Curvature
from lightning_flatness.curvature.methods import (
    AutoMethod,
    LayerName,
    Method,
    MethodName,
    Quantities,
    Recorder,
    method_for,
)
from lightning_flatness.data.batches import require_batches
from lightning_flatness.data.passes import ASSUMED, device_of, measured_batches, preserved_state
from lightning_flatness.data.verification import Verification
from lightning_flatness.errors import NonFiniteError, require_optional_counts
from lightning_flatness.functional import standard_error
from lightning_flatness.keys import CONFIDENCE, LABELLED, MARGIN_BOUND, RELATIVE, SCALE_FREE, SOFTMAX_MARGIN, TRACE
from lightning_flatness.losses import Loss, as_loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.metrics.layers import LayerEvaluation, evaluation_of
from lightning_flatness.metrics.samples import per_sample_values
from lightning_flatness.recording.layers import refuse_programs
from lightning_flatness.reporting.report_figure import report_figure
from lightning_flatness.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerFlatness:
    """Flatness of one layer on a set of samples; lower is flatter.

    Attributes:
        relative_flatness: mean over samples; unit of the loss.
        hessian_trace: mean over samples; loss per squared weight.
        curvature: `"hessian"`; `"ggn"` where both are those of the Gauss-Newton part: for `"jacobian"` since the
            network is not known to be piecewise linear behind the layer, for `"pooled"` since the head is curved and
            large.
        standard_errors: of the two means, for `estimate=True`, see `functional.standard_error`; None: they are exact.
    """

    relative_flatness: float
    hessian_trace: float
    curvature: Curvature = "hessian"
    standard_errors: tuple[float, float] | None = None


@dataclass(frozen=True)
class FlatnessReport:
    """Flatness of one layer, or of several, on a set of samples; lower is flatter.

    Attributes:
        layer: name of the layer: a convolution, the classifier, or what was asked for; several are separated by commas.
        classifier: name of the last linear layer behind it, or of the classifier itself; empty if there is none.
        n_samples: number of samples.
        relative_flatness: mean over samples, see `functional.relative_flatness`; unit of the loss. None where several
            layers were measured, see `layers`.
        hessian_trace: mean over samples, see `functional.hessian_trace`; loss per squared weight. None as above.
        scale_free_flatness: relative flatness of the predictor with its logits divided by their spread; unit of the
            loss. None where the loss is neither cross-entropy nor binary cross-entropy, or the head is curved, and for
            `"jacobian"`.
        confidence: mean of the uncertainty `1 - |S|^2`, see `functional.confidence`; no unit.
        margins: statistics of the signed output margins by name, see `functional.distribution`, and `scale_free`, their
            mean divided by the spread of the logits; in the unit of the logits, except for `skewness`, `negative` and
            `scale_free`, which have none. Higher margins are better.
        samples: the values of each sample by name, shape (n,), if they were asked for: `relative_flatness`,
            `hessian_trace`, `confidence`, `affine_hessian_trace`, `head_relative_flatness`, `output_margin`,
            `softmax_margin` and `margin_bound`, as far as the loss and the head have them; `SampleQuantities`
            describes them. Where several layers were measured, the first two are `relative_flatness/<layer>` and
            `hessian_trace/<layer>`; `network_trace` is that of each sample.
        method: `"pooled"`, the closed form under global pooling; `"classifier"`, that of the classifier's own weight;
            `"jacobian"`, backward passes.
        exact: whether all numbers are those of the Hessian, and none is an estimate. The first two methods refuse what
            they cannot do exactly, but for curved heads behind which the Hessian would take longer than the network.
        assumed: what was assumed instead of proved, in words.
        reason: why the method was chosen, if it was not named.
        layers: the values of each layer by its name.
        network_trace: mean trace with respect to all parameters of the network, for `layer="all"`; loss per squared
            parameter. None if not all batches cover the same parameters.
        network_curvature: what `network_trace` belongs to, as in `LayerFlatness`.
        left_out: names of parameters that `network_trace` does not cover.
        network_standard_error: of `network_trace`, as in `LayerFlatness`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatness.measure import measure
        >>> tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), *tail)
        >>> report = measure(network, [(torch.ones(2, 1, 6, 6), torch.tensor([0, 1]))])
        >>> report.layer, report.classifier, report.n_samples, report.method
        ('0', '4', 2, 'pooled')
        >>> sorted(report.margins)[:3]
        ['mean', 'min', 'negative']
    """

    layer: str
    classifier: str
    n_samples: int
    relative_flatness: float | None
    hessian_trace: float | None
    scale_free_flatness: float | None
    confidence: float
    margins: dict[str, float]
    samples: dict[str, Tensor] | None = None
    method: str = "pooled"
    exact: bool = True
    assumed: tuple[str, ...] = ()
    reason: str = ""
    layers: dict[str, LayerFlatness] = field(default_factory=dict)
    network_trace: float | None = None
    network_curvature: Curvature = "hessian"
    left_out: tuple[str, ...] = ()
    network_standard_error: float | None = None

    @property
    def curvature(self) -> Curvature:
        """`"ggn"` if some of the numbers are those of the Gauss-Newton part, else `"hessian"`."""
        kinds = (self.network_curvature, *(layer.curvature for layer in self.layers.values()))
        return "ggn" if "ggn" in kinds else "hessian"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python types, without the per-sample values."""
        return {name: value for name, value in asdict(replace(self, samples=None)).items() if name != "samples"}

    def plot(self, dark: bool = False) -> Figure:
        """Return a figure of the margins, and of the flatness of each sample if `per_sample=True` kept it.

        Args:
            dark: light lines on a dark ground.

        Returns:
            A matplotlib figure; save it with `report.plot().savefig("report.png")`.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        footer = f"layer {self.layer} · method {self.method} · {self.n_samples:,} samples"
        return report_figure(self.margins, self.samples, str(self), footer, dark)

    def __str__(self) -> str:
        """Return the report as a table."""
        rows = self._rows()
        width = max(22, *(len(name) + 2 for name, _ in rows))
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """Return the report as an HTML table, which notebooks show."""
        names, values = zip(*self._rows(), strict=True)
        return Table({"": names, "value": values})._repr_html_()

    def _rows(self) -> list[tuple[str, str]]:
        scale_free = self.scale_free_flatness
        return [
            ("layer", self.layer),
            *([("classifier", self.classifier)] if self.classifier not in ("", self.layer) else []),
            *([("measured by", f'"{self.method}". {self.reason}'.rstrip(". "))] if self.method != "pooled" else []),
            ("samples", f"{self.n_samples}"),
            *self._flatness_rows(),
            *([("scale-free flatness", f"{scale_free:.6g}  (lower is flatter)")] if scale_free is not None else []),
            ("confidence 1 - |S|^2", f"{self.confidence:.6g}  (lower is more confident)"),
            *((f"margin {name}", f"{value:.6g}") for name, value in self.margins.items()),
            *(("assumed", what) for what in self.assumed),
        ]

    def _numbers(self) -> dict[str, float]:
        own = {
            "relative flatness": self.relative_flatness,
            "Hessian trace": self.hessian_trace,
            "scale-free flatness": self.scale_free_flatness,
            "confidence": self.confidence,
        }
        if self.relative_flatness is None:
            for name, layer in self.layers.items():
                own |= {f"{name}: relative flatness": layer.relative_flatness, f"{name}: trace": layer.hessian_trace}
            own["whole network: trace"] = self.network_trace
        numbers = {name: value for name, value in own.items() if value is not None}
        return numbers | {f"margin {name}": value for name, value in self.margins.items()}

    def _flatness_rows(self) -> list[tuple[str, str]]:
        """Return the rows of the layers and of the network."""
        rows: list[tuple[str, str]] = []
        for name, layer in self.layers.items():
            errors = layer.standard_errors or (None, None)
            relative, trace = _text(layer.relative_flatness, errors[0]), _text(layer.hessian_trace, errors[1])
            end = _end(layer.curvature)
            if self.relative_flatness is None:
                rows.append((name, f"relative flatness {relative}, Hessian trace {trace}{end}"))
            else:
                rows += [("relative flatness", f"{relative}{end}"), ("Hessian trace", f"{trace}{end}")]
        if self.network_trace is not None:
            trace = _text(self.network_trace, self.network_standard_error)
            rows.append(("whole network", f"Hessian trace {trace}{_end(self.network_curvature)}"))
        return rows + [("not covered", name) for name in self.left_out]


def _text(value: float, error: float | None) -> str:
    return f"{value:.6g}" if error is None else f"{value:.6g} ± {error:.2g}"


def _end(curvature: Curvature) -> str:
    return f"  (lower is flatter{'; of the Gauss-Newton part' if curvature == 'ggn' else ''})"


def compare(first: FlatnessReport, second: FlatnessReport) -> Table:
    """Return a table of two reports with the ratio of their numbers, second to first.

    A ratio stands where both numbers are positive. Compare the same layer on the same samples: the table shows both, so
    that a difference is seen.

    Args:
        first: the report that the other is compared with.
        second: the other one.

    Returns:
        The table; `print` it, or look at it in a notebook.

    Example:
        >>> first = FlatnessReport("conv", "fc", 9, 4.0, 2.0, 1.0, 0.5, {"mean": 1.0})
        >>> second = FlatnessReport("conv", "fc", 9, 2.0, 3.0, None, 0.5, {"mean": -1.0})
        >>> compare(first, second).rows[3:5]
        [('relative flatness', '4', '2', '0.5'), ('Hessian trace', '2', '3', '1.5')]
    """
    rows: list[tuple[str, ...]] = [
        (name, str(one), str(other), "")
        for name, one, other in (
            ("layer", first.layer, second.layer),
            ("method", first.method, second.method),
            ("samples", first.n_samples, second.n_samples),
        )
    ]
    ours, theirs = first._numbers(), second._numbers()
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        has_ratio = one is not None and other is not None and one > 0 and other > 0
        ratio = f"{cast(float, other) / cast(float, one):.4g}" if has_ratio else ""
        rows.append((name, *("" if value is None else f"{value:.6g}" for value in (one, other)), ratio))
    return Table(dict(zip(("what", "first", "second", "ratio"), zip(*rows, strict=True), strict=True)))


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    layer: LayerName = None,
    classifier: str | None = None,
    method: MethodName = "auto",
    max_samples: int | None = None,
    per_sample: bool = False,
    target: Callable[[Any], Tensor] | None = None,
    loss: str | nn.Module | Loss | Callable[[Any, Any], Tensor] | None = None,
    verify: bool = True,
    chunk_bytes: int | None = None,
    estimate: bool = False,
) -> FlatnessReport:
    """Measure the Hessian trace and relative flatness of a layer: a pooled convolution, the classifier, or any other.

    The model is evaluated in eval mode and left as it was: modes, gradients, hooks, buffers, random generators. What
    the forward pass changes elsewhere stays changed, such as a Python counter or a tensor that is not a buffer.

    In a process group it measures the batches of this process, and exchanges nothing with the others.

    Args:
        model: any module; it is called with the inputs of each batch.
        batches: an iterable of (inputs, targets), such as a `DataLoader`.
        layer: name of the convolution; None: the deepest. For
            `method="jacobian"` the name of any linear layer or convolution, several names, or `"all"`: every one of
            them, and the trace of the whole network.
        classifier: name of the linear classifier; None: found.
        method: `"auto"`: the convolution if that is exact, else the classifier's own weight, see `select_method`; a
            convolution that `layer` names is not replaced. `"pooled"`: the convolution or nothing. `"classifier"`: the
            classifier's own weight. `"jacobian"`: the layers that `layer` names; exact where the network is piecewise
            linear behind the layer, else the values of the Gauss-Newton part, which are labelled.
        max_samples: stop after so many samples; None: all.
        per_sample: also keep the values of every sample.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: the training loss: `"cross_entropy"`, `"bce_with_logits"`, a loss module of torch, or any function of
            what the model returns and the targets that returns one number. None: cross-entropy, and the report says
            that it is assumed.
        verify: call the network again on a few samples with moved filters, and compare its loss with what the record
            predicts; see `docs/concepts/assumptions.md`. The weight is restored to the last bit.
        chunk_bytes: how much memory the contraction over filters (for `"jacobian"`, the derivatives) may take at once,
            in bytes: samples are contracted in groups that fit, or one by one. It does not bound what the forward pass
            and its record take, nor for the other methods the derivatives; that grows with the batch. None: 16 MiB, for
            `"jacobian"` 256 MiB, on a CUDA device 512 MiB.
        estimate: for `"jacobian"`: two backward passes instead of one for each class but one. Trace and relative
            flatness are then unbiased estimates, and the report has their standard errors; the rest stays exact.

    Returns:
        The report; `print` it, or read its attributes.

    Raises:
        UnsupportedTailError: if no method is exact for this model; the message has the path and step.
        NonFiniteError: if the logits hold NaN.
        ValueError: if a name, a batch or a target is not what it must be.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatness.measure import measure
        >>> tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), *tail)
        >>> batches = [(torch.ones(5, 1, 6, 6), torch.zeros(5).long()), (torch.ones(3, 1, 6, 6), torch.zeros(3).long())]
        >>> report = measure(network, batches, max_samples=6, per_sample=True)
        >>> report.n_samples, report.samples["hessian_trace"].shape
        (6, torch.Size([6]))
    """
    require_batches(batches, "batches")
    require_optional_counts(max_samples=max_samples, chunk_bytes=chunk_bytes)
    refuse_programs(model)
    recorder, measuring = method_for(model, method, layer, classifier, chunk_bytes, estimate=estimate)
    criterion = None if loss is None else as_loss(loss)
    evaluation = evaluation_of(recorder, device_of(model), measuring.name, is_shared=False)
    verification = Verification(verify)
    parts: list[Quantities] = []
    with preserved_state(model):
        options = max_samples, target, criterion, verification
        for quantities in measured_batches(recorder, measuring, model, batches, *options):
            evaluation.update(cast(Any, quantities))
            if per_sample or estimate:
                parts.append(quantities)
    if evaluation.samples == 0:
        raise ValueError(
            "`batches` must yield at least one sample that the loss depends on; got none. If it is a generator, make a "
            "new one: it can be read only once."
        )
    assumed = *((ASSUMED,) if loss is None else ()), *verification.assumed
    samples = per_sample_values(parts) if parts else {}
    report = _report(recorder, measuring, evaluation, samples if per_sample else None, assumed)
    return _with_errors(report, samples) if estimate else report


def _with_errors(report: FlatnessReport, samples: dict[str, Tensor]) -> FlatnessReport:
    """Return the report of estimates, with their standard errors."""
    errors = {name: float(standard_error(values)) for name, values in samples.items()}
    layers = {}
    for name, layer in report.layers.items():
        end = f"/{name}" if len(report.layers) > 1 else ""
        own = errors[f"relative_flatness{end}"], errors[f"hessian_trace{end}"]
        layers[name] = replace(layer, standard_errors=own)
    network = None if report.network_trace is None else errors["network_trace"]
    return replace(report, layers=layers, network_standard_error=network, exact=False)


def _report(
    recorder: Recorder,
    method: Method,
    evaluation: Evaluation | LayerEvaluation,
    samples: dict[str, Tensor] | None,
    assumed: tuple[str, ...],
) -> FlatnessReport:
    """Return the report of an evaluation, after checking that its values are finite."""
    parts: dict[str | None, tuple[dict[str, Tensor], Curvature]] = {}
    if isinstance(evaluation, LayerEvaluation):
        parts, common = evaluation.by_part(), evaluation.common()
    else:
        common = evaluation.compute()
        plain = {key: common[label] for key, label in LABELLED.items() if label in common}
        parts[str(recorder.layer)] = (plain, "ggn") if plain else (common, "hessian")
    values = _finite(common)
    whole, whole_curvature = parts.pop(None, ({}, "hessian"))
    trace = _finite(whole, "of the network").get(TRACE)
    layers = {}
    for name, (own, curvature) in parts.items():
        found = _finite(own, f"of `{name}`")
        layers[str(name)] = LayerFlatness(found[RELATIVE], found[TRACE], curvature)
    only = next(iter(layers.values())) if len(layers) == 1 else None
    choice = method.choice if isinstance(method, AutoMethod) else None
    return FlatnessReport(
        layer=str(recorder.layer),
        classifier=recorder.classifier or "",
        n_samples=evaluation.samples,
        relative_flatness=only.relative_flatness if only else None,
        hessian_trace=only.hessian_trace if only else None,
        scale_free_flatness=values.get(SCALE_FREE),
        confidence=values[CONFIDENCE],
        margins={
            key.removeprefix("margin/"): value
            for key, value in values.items()
            if key.startswith("margin/") and key not in (SOFTMAX_MARGIN, MARGIN_BOUND)
        },
        samples=samples,
        method=choice.name if choice else method.name,
        exact="ggn" not in (whole_curvature, *(layer.curvature for layer in layers.values())),
        assumed=assumed,
        reason=choice.reason if choice else "",
        layers=layers,
        network_trace=trace,
        network_curvature=whole_curvature,
        left_out=getattr(evaluation, "left_out", ()),
    )


def _finite(values: dict[str, Tensor], whose: str = "") -> dict[str, float]:
    """Return values as numbers, after checking that they are finite."""
    found = {key: float(value) for key, value in values.items()}
    if broken := [f"{key} {whose}".rstrip() + f" = {value}" for key, value in found.items() if not isfinite(value)]:
        raise NonFiniteError(
            f"All values must be finite; got {', '.join(broken)}. Look for overflow in the network, for logits of "
            "minus infinity that mask the true class, and for a step without a derivative, as a norm of features "
            "that are all zero."
        )
    return found
