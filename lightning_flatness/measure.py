"""Measures a model on batches of data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.data.passes import ASSUMED, device_of, measured_batches, preserved_state
from lightning_flatness.errors import NonFiniteError, require_counts
from lightning_flatness.keys import CONFIDENCE, MARGIN_BOUND, RELATIVE, SCALE_FREE, SOFTMAX_MARGIN, TRACE
from lightning_flatness.losses import Loss, as_loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.recording.layers import refuse_programs
from lightning_flatness.recording.recorder import ForwardRecorder

_QUANTITIES = (
    "relative_flatness",
    "hessian_trace",
    "confidence",
    "affine_hessian_trace",
    "head_relative_flatness",
    "output_margin",
    "softmax_margin",
    "margin_bound",
)


@dataclass(frozen=True)
class FlatnessReport:
    """Exact flatness of one convolution on a set of samples; lower is flatter.

    Attributes:
        layer: name of the convolution.
        classifier: name of the classifier; the network's own name where the convolution is the classifier.
        n_samples: number of samples.
        relative_flatness: mean over samples, see `functional.relative_flatness`.
        hessian_trace: mean over samples, see `functional.hessian_trace`.
        scale_free_flatness: relative flatness of the predictor with its logits divided by their spread; None where the
            loss is neither cross-entropy nor binary cross-entropy, or the head is curved.
        confidence: mean of `1 - |S|^2`, see `functional.confidence`.
        margins: statistics of the signed output margins.
        samples: per-sample values by name, shape (n,), if they were asked for.
        method: `"pooled"`, the closed form under global pooling.
        exact: whether the numbers are exact; True for `"pooled"`, which refuses what it cannot do exactly.
        assumed: what was assumed instead of proved, in words.
    """

    layer: str
    classifier: str
    n_samples: int
    relative_flatness: float
    hessian_trace: float
    scale_free_flatness: float | None
    confidence: float
    margins: dict[str, float]
    samples: dict[str, Tensor] | None = None
    method: str = PooledMethod.name
    exact: bool = True
    assumed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python types, without the per-sample values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "samples"}

    def __str__(self) -> str:
        """Return the report as a table."""
        scale_free = self.scale_free_flatness
        rows = [
            ("layer", self.layer),
            ("classifier", self.classifier),
            ("samples", f"{self.n_samples}"),
            ("relative flatness", f"{self.relative_flatness:.6g}  (lower is flatter)"),
            ("Hessian trace", f"{self.hessian_trace:.6g}  (lower is flatter)"),
            *([("scale-free flatness", f"{scale_free:.6g}  (lower is flatter)")] if scale_free is not None else []),
            ("confidence 1 - |S|^2", f"{self.confidence:.6g}  (lower is more confident)"),
            *((f"margin {name}", f"{value:.6g}") for name, value in self.margins.items()),
            *(("assumed", what) for what in self.assumed),
        ]
        return "\n".join(f"{name:<22}{value}" for name, value in rows)


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str | None = None,
    classifier: str | None = None,
    max_samples: int | None = None,
    per_sample: bool = False,
    target: Callable[[Any], Tensor] | None = None,
    loss: str | nn.Module | Loss | Callable[[Any, Any], Tensor] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> FlatnessReport:
    """Measure the exact Hessian trace and relative flatness of a convolution under global pooling.

    The model is evaluated in eval mode and left as it was: mode, gradients, hooks, buffers, RNG state.

    Args:
        model: any module; called with the inputs of a batch.
        batches: of (inputs, targets); a `DataLoader` is one.
        layer: name of the convolution; None: the last one that runs on a map larger than 1 x 1.
        classifier: name of the linear classifier; None: found.
        max_samples: stop after so many samples; None: all.
        per_sample: also keep the values of every sample.
        target: returns the targets of a batch; None: `batch[1]`, or the usual keys of a dictionary.
        loss: the training loss: `"cross_entropy"`, `"bce_with_logits"`, or the `nn.CrossEntropyLoss` or
            `nn.BCEWithLogitsLoss` that is used.
        chunk_bytes: what temporary tensors may take at once: samples are computed in groups that fit, or one by one.

    Returns:
        The report; `print` it, or read its attributes.

    Raises:
        UnsupportedTailError: if the closed form is not exact for this model; the message has the path and step.
        NonFiniteError: if the logits hold NaN.
        ValueError: if a name, a batch or a target is not what it must be.

    Example:
        >>> report = measure(model, loader)  # doctest: +SKIP
        >>> report.relative_flatness  # doctest: +SKIP
    """
    if not isinstance(batches, Iterable):
        raise ValueError(f"`batches` must be an iterable of (inputs, targets); got {type(batches).__name__}.")
    require_counts(chunk_bytes=chunk_bytes)
    if max_samples is not None:
        require_counts(max_samples=max_samples)
    refuse_programs(model)
    recorder, method = ForwardRecorder(model, layer, classifier), PooledMethod(chunk_bytes)
    criterion = None if loss is None else as_loss(loss)
    evaluation = Evaluation(device_of(model), method.name)
    parts: list[SampleQuantities] = []
    with preserved_state(model):
        for quantities in measured_batches(recorder, method, model, batches, max_samples, target, criterion):
            evaluation.update(quantities)
            if per_sample:
                parts.append(quantities)
    if evaluation.samples == 0:
        raise ValueError("`batches` must yield at least one sample; got none.")
    values = {key: float(value) for key, value in evaluation.compute().items()}
    if broken := [key for key, value in values.items() if not isfinite(value)]:
        raise NonFiniteError(f"Values must be finite; these are not: {broken}.")
    return FlatnessReport(
        layer=str(recorder.layer),
        classifier=str(recorder.classifier),
        n_samples=evaluation.samples,
        relative_flatness=values[RELATIVE],
        hessian_trace=values[TRACE],
        scale_free_flatness=values.get(SCALE_FREE),
        confidence=values[CONFIDENCE],
        margins={
            key.removeprefix("margin/"): value
            for key, value in values.items()
            if key.startswith("margin/") and key not in (SOFTMAX_MARGIN, MARGIN_BOUND)
        },
        samples=_per_sample(parts) if per_sample else None,
        assumed=(ASSUMED,) if loss is None else (),
    )


def _per_sample(parts: list[SampleQuantities]) -> dict[str, Tensor]:
    """Return the quantities that all batches have."""
    names = [name for name in _QUANTITIES if all(getattr(part, name) is not None for part in parts)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
