"""Measures recorded passes of any network, layer by layer, by backward passes from the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_flatness.curvature.chunks import chunk_bytes_on
from lightning_flatness.curvature.jacobian.factor import estimated_factor, longest_factor, loss_factor
from lightning_flatness.curvature.jacobian.mean_hessian import LayerGradients
from lightning_flatness.curvature.jacobian.network import Network, network_of
from lightning_flatness.curvature.jacobian.pullback import bytes_per_sample, contributions, gradients
from lightning_flatness.curvature.objective import Objective
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import Refusal, require_optional_counts
from lightning_flatness.losses import Differentiated
from lightning_flatness.precision import full_precision
from lightning_flatness.recording.dispatch import not_recorded
from lightning_flatness.recording.recorded_layers import RecordedLayers

Curvature = Literal["hessian", "ggn"]
_T = TypeVar("_T")
_CPU_BYTES = 256 * 2**20  # for derivatives, larger groups are faster
_FUSED = " Let attention run step by step: `torch.backends.mha.set_fastpath_enabled(False)`."


@dataclass(frozen=True)
class LayerQuantities:
    """The quantities of one batch for each layer, and for the whole network if it was asked for.

    Attributes:
        by_layer: quantities of each sample, by the layer's name. `curvature` says whether they belong to the Hessian or
            to its Gauss-Newton part.
        network: trace with respect to all parameters that are covered, shape (n,); loss per squared parameter. None
            where single layers were named.
        left_out: names of parameters that `network` does not cover.
        network_curvature: whether `network` belongs to the Hessian or to its Gauss-Newton part.
        is_estimate: whether trace and relative flatness are unbiased estimates; `functional.standard_error` of
            them is the error of their mean.
        is_lower_bound: whether they are lower bounds for every sample.
    """

    by_layer: dict[str, SampleQuantities]
    network: Float[Tensor, " n"] | None = None
    left_out: tuple[str, ...] = ()
    network_curvature: Curvature = "hessian"
    is_estimate: bool = False
    is_lower_bound: bool = False

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.by_layer.values())))

    @property
    def curvature(self) -> dict[str, Curvature]:
        """What the values of each layer belong to."""
        return {name: quantities.curvature for name, quantities in self.by_layer.items()}


class JacobianMethod:
    r"""The Hessian trace and relative flatness of any linear layer or convolution, for every sample.

    The curvature of the loss in the logits has \(C - 1\) factors for cross-entropy, one for each logit for other
    losses. A backward pass of each reaches all layers; a layer's input and the cotangent at its output give what the
    factor contributes. The values are the Hessian's where the network is piecewise linear behind the layer, else those
    of its generalized Gauss-Newton part; `SampleQuantities.curvature` says which.

    Args:
        chunk_bytes: how much memory the derivatives may take at once, in bytes; samples are measured in groups that
            fit. None: 256 MiB, on a CUDA device 512 MiB.
        estimate: two backward passes instead of one for each factor: trace and relative flatness are unbiased
            estimates, see `functional.two_pass_cotangents`. Their random signs come from a generator of their own.
        longest: only so many factors of each sample, those that are longest in the logits: trace and relative flatness
            are lower bounds, see `functional.longest_first`. None: all.

    Raises:
        ValueError: if `chunk_bytes` or `longest` is not a whole number, at least 1, or there is an estimate as well.

    Example:
        >>> method = JacobianMethod()
        >>> method.quantities(recorder.take_pass(loss)).by_layer["conv1"].hessian_trace  # doctest: +SKIP
    """

    name = "jacobian"

    def __init__(self, chunk_bytes: int | None = None, estimate: bool = False, longest: int | None = None) -> None:
        """Check the arguments."""
        require_optional_counts(chunk_bytes=chunk_bytes, longest=longest)
        if estimate and longest is not None:
            raise ValueError(f"An estimate takes no `longest` factors; got `longest={longest}`. Leave one of them out.")
        self._chunk_bytes = chunk_bytes
        self._is_estimate, self._is_bound = estimate, longest is not None
        self._factor: Callable[[Objective], tuple[Tensor, Tensor | None]] = loss_factor
        self._columns = 2 if estimate else longest
        if estimate:
            self._factor = partial(estimated_factor, generator=torch.Generator().manual_seed(0))
        elif longest is not None:
            self._factor = partial(longest_factor, count=longest)

    def quantities(self, recorded: RecordedLayers, samples: slice = slice(None)) -> LayerQuantities:
        """Return the quantities of a recorded pass, for the samples that the loss depends on.

        Args:
            recorded: the pass.
            samples: which of its samples to measure.

        Raises:
            UnsupportedTailError: if the samples are coupled, or a step cannot be repeated or differentiated.
            NonFiniteError: if the logits hold NaN.
        """
        return self._measured(recorded, lambda network: self._quantities(network, samples), self._factor, self._columns)

    def gradients(self, recorded: RecordedLayers, layer: str, samples: slice = slice(None)) -> LayerGradients:
        """Return the rows whose outer products are the layer's curvature; arguments and errors as for `quantities`.

        Args:
            recorded: the pass.
            layer: name of one of its layers.
            samples: which of its samples to measure.
        """
        return self._measured(recorded, lambda network: self._gradients(network, layer, samples))

    def _measured(
        self,
        recorded: RecordedLayers,
        measure: Callable[[Network], _T],
        factor: Any = loss_factor,
        columns: int | None = None,
    ) -> _T:
        device = recorded.graph.tensor_of(recorded.loss).device
        with ExitStack() as stack:
            for context in (not_recorded(), torch.inference_mode(False), full_precision(device)):
                stack.enter_context(context)
            try:
                return measure(network_of(recorded, factor, columns))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what cannot be repeated, or has no derivative
                is_fused = "_native_multi_head" in recorded.path or "_transformer_encoder" in recorded.path
                raise Refusal(
                    "The steps from the layers to the loss must be repeatable, differentiable and of each sample on "
                    f"its own; {error}.{_FUSED if is_fused else ''}\n  path: {recorded.path}",
                    error,
                ).error() from error

    def _gradients(self, network: Network, layer: str, samples: slice) -> LayerGradients:
        weight, kept = network.recorded.layers[layer], network.goal.kept(samples)
        found = self._by_groups(network, kept, lambda part: gradients(network, part, weight))
        rows, signs = (torch.cat([each[index][kept[part]] for part, each in found]) for index in (0, 1))
        return LayerGradients(rows, signs, _curvature(network, weight))

    def _quantities(self, network: Network, samples: slice) -> LayerQuantities:
        kept, plan = network.goal.kept(samples), network.plan
        sums = {name: torch.zeros(2, len(kept)).to(kept.device, torch.float64) for name in network.recorded.parameters}
        at_once = chunk_bytes_on(kept.device, self._chunk_bytes, _CPU_BYTES)
        for part, found in self._by_groups(network, kept, lambda part: contributions(network, part, at_once)):
            for name, values in found.items():
                sums[name][:, part] = torch.stack(values)
        covered = {name: values[:, kept] for name, values in sums.items() if name not in plan.left_out}
        by_layer = {
            layer: _of_layer(network, weight, covered[weight], kept)
            for layer, weight in network.recorded.layers.items()
            if weight in covered and plan.is_weight(weight)
        }
        if not network.recorded.is_whole:
            return LayerQuantities(by_layer, is_estimate=self._is_estimate, is_lower_bound=self._is_bound)
        total = torch.stack([trace for trace, _ in covered.values()]).sum(0)
        kind = _curvature(network, *covered)
        return LayerQuantities(by_layer, total, tuple(plan.left_out), kind, self._is_estimate, self._is_bound)

    def _by_groups(self, network: Network, kept: Tensor, measure: Callable[[slice], _T]) -> list[tuple[slice, _T]]:
        """Return what a function has for groups of samples that fit into memory, as far as some of them are kept."""
        n = len(kept)
        step = max(
            1, min(n, chunk_bytes_on(kept.device, self._chunk_bytes, _CPU_BYTES) // max(1, bytes_per_sample(network)))
        )
        parts = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        try:
            return [(part, measure(part)) for part in parts if bool(kept[part].any())]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if step >= n:
                raise
            return [(slice(n), measure(slice(n)))]  # a step mixes the samples' places


def _curvature(network: Network, *parameters: str) -> Curvature:
    return "hessian" if all(map(network.plan.is_exact, parameters)) else "ggn"


def _of_layer(network: Network, weight: str, values: Tensor, kept: Tensor) -> SampleQuantities:
    goal = network.goal
    loss, logits, target = goal.loss.select(kept), goal.logits[kept], goal.target
    margins: dict[str, Any] = {}
    if target is not None and not isinstance(loss, Differentiated):
        margins["output_margin"] = loss.output_margin(logits, target[kept])
        margins["softmax_margin"] = loss.softmax_margin(logits, target[kept])
    return SampleQuantities(
        hessian_trace=values[0],
        relative_flatness=values[1],
        confidence=loss.curvature_trace(logits, None if target is None else target[kept]),
        kernel_squared_norm=network.grams[weight].diagonal().sum(),
        prediction=None if isinstance(loss, Differentiated) else loss.prediction(logits),
        curvature=_curvature(network, weight),
        **margins,
    )
