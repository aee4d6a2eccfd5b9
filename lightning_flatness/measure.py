"""Measures a model on batches of data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_flatness.curvature.pooled.derivatives import CHUNK_BYTES, TailFactors
from lightning_flatness.curvature.pooled.measurement import Tap
from lightning_flatness.data.batches import batch_inputs, batch_targets, is_empty
from lightning_flatness.losses import Loss, as_loss
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.recording.recorded_pass import NonFiniteError

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
        scale_free_flatness: relative flatness of the predictor with its logits divided by their spread.
        confidence: mean of `1 - |S|^2`, see `functional.confidence`.
        margins: statistics of the signed output margins.
        samples: per-sample values by name, shape (n,), if they were asked for.
        method: `"gap"`, the closed form under global pooling.
        exact: whether the numbers are exact; True for `"gap"`, which refuses what it cannot do exactly.
    """

    layer: str
    classifier: str
    n_samples: int
    relative_flatness: float
    hessian_trace: float
    scale_free_flatness: float
    confidence: float
    margins: dict[str, float]
    samples: dict[str, Tensor] | None = None
    method: str = "gap"
    exact: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python types, without the per-sample values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "samples"}

    def __str__(self) -> str:
        """Return the report as a table."""
        rows = [
            ("layer", self.layer),
            ("classifier", self.classifier),
            ("samples", f"{self.n_samples}"),
            ("relative flatness", f"{self.relative_flatness:.6g}  (lower is flatter)"),
            ("Hessian trace", f"{self.hessian_trace:.6g}  (lower is flatter)"),
            ("scale-free flatness", f"{self.scale_free_flatness:.6g}  (lower is flatter)"),
            ("confidence 1 - |S|^2", f"{self.confidence:.6g}  (lower is more confident)"),
            *((f"margin {name}", f"{value:.6g}") for name, value in self.margins.items()),
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
    loss: str | nn.Module | Loss = "cross_entropy",
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
    tap = Tap(model, layer, classifier, as_loss(loss), chunk_bytes)
    evaluation = Evaluation(device_of(model))
    parts: list[dict[str, Tensor]] = []
    with undisturbed(model):
        for factors in batch_factors(tap, model, batches, max_samples, target):
            evaluation.update(factors)
            if per_sample:
                parts.append({name: getattr(factors, name) for name in _QUANTITIES})
    if evaluation.samples == 0:
        raise ValueError("`batches` must yield at least one sample; got none.")
    values = {key: float(value) for key, value in evaluation.compute().items()}
    if broken := [key for key, value in values.items() if not isfinite(value)]:
        raise NonFiniteError(f"Values must be finite; these are not: {broken}.")
    return FlatnessReport(
        layer=str(tap.layer),
        classifier=str(tap.classifier),
        n_samples=evaluation.samples,
        relative_flatness=values["flatness/relative"],
        hessian_trace=values["flatness/trace"],
        scale_free_flatness=values["flatness/scale_free"],
        confidence=values["flatness/confidence"],
        margins={
            key.removeprefix("margin/"): value
            for key, value in values.items()
            if key.startswith("margin/") and key not in ("margin/softmax_mean", "margin/bound")
        },
        samples={name: torch.cat([part[name] for part in parts]) for name in _QUANTITIES} if per_sample else None,
    )


def require_counts(**counts: object) -> None:
    """Refuse arguments that are not a whole number, at least 1.

    Raises:
        ValueError: names the argument.
    """
    for argument, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{argument}` must be a whole number, at least 1; got {value!r}.")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def batch_factors(
    tap: Tap,
    model: nn.Module,
    batches: Iterable[Any],
    max_samples: int | None = None,
    target: Callable[[Any], Tensor] | None = None,
) -> Iterator[TailFactors]:
    """Run the model on each batch and yield its factors, of no more than `max_samples` samples in all."""
    left = max_samples
    device = device_of(model)
    with tap:
        for batch in batches:
            try:
                batch = move_data_to_device(batch, device)
            except NotImplementedError as error:  # such as tensors of the meta device, which hold nothing
                raise ValueError(f"A batch must hold data that can be moved to {device}: {error}") from error
            targets = (target or batch_targets)(batch)
            if is_empty(batch, targets):
                continue
            with torch.no_grad(), tap.alone():
                model(batch_inputs(batch))
            factors = tap.factors(targets)
            yield factors if left is None else factors.select(slice(left))
            left = None if left is None else left - len(factors)
            if left is not None and left <= 0:
                return


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode; afterwards leave the modes and all random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    generators = isolate_rng()
    generators.__enter__()
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        generators.__exit__(None, None, None)  # told of an exception, it would not restore them
