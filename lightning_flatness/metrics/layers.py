"""What one evaluation yields where several layers are measured, or the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import torch
from torch import Tensor

from lightning_flatness.curvature.jacobian.method import Curvature, JacobianMethod, LayerQuantities
from lightning_flatness.curvature.methods import Recorder
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import Refusal
from lightning_flatness.keys import NETWORK, OF_LAYER, TRACE, keys_of, layer_key
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.recording.layers_recorder import LayersRecorder

_FACTS = 4  # numbers that processes exchange beside two for each layer


class LayerEvaluation:
    """The quantities of each layer, of the whole network and of the samples; exact for any split into batches.

    A layer has a value if every batch has one for it. The network has one if, besides, all batches cover the same
    parameters. Processes have to `agree` on that before they `compute`.

    Args:
        device: device of the model.
        layers: names of the layers.
        is_whole: whether the whole network is measured too.
        is_shared: whether the samples of all processes count together.

    Attributes:
        left_out: names of parameters that the network's trace does not cover, or not in every batch.
        label: empty, as each layer has its own.

    Example:
        >>> evaluation = LayerEvaluation(torch.device("cpu"), ["conv1", "conv2"], is_whole=True)
        >>> evaluation.samples
        0
    """

    label = ""

    def __init__(self, device: torch.device, layers: Sequence[str], is_whole: bool, is_shared: bool = True) -> None:
        """Start with no samples."""
        common = [key for key in keys_of(JacobianMethod.name) if key not in OF_LAYER]
        self._common = Evaluation(device, is_shared=is_shared, keys=common)
        keys: dict[str | None, tuple[str, ...]] = dict.fromkeys(layers, OF_LAYER)
        if is_whole:
            keys[None] = (TRACE,)
        self._parts = {part: Evaluation(device, is_shared=is_shared, keys=own) for part, own in keys.items()}
        self._curved: set[str | None] = set()  # what has Gauss-Newton values
        self._valid: set[str | None] = set()
        self._covered: tuple[str, ...] | None = None  # what the first batch left out
        self.left_out: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples so far, of this process."""
        return self._common.samples

    def update(self, quantities: LayerQuantities) -> None:
        """Add the samples of one batch.

        Raises:
            UnsupportedTailError: if no layer has a value.
        """
        if not quantities.by_layer:
            raise Refusal(
                "A linear layer or a convolution must use its weight alone, and once for each sample or position; no "
                f"layer does. Parameters that are not covered: {list(quantities.left_out)}."
            ).error()
        first = next(iter(quantities.by_layer.values()))
        self._common.update(first)
        parts: dict[str | None, SampleQuantities] = dict(quantities.by_layer.items())
        self._covered = quantities.left_out if self._covered is None else self._covered
        self.left_out = tuple(dict.fromkeys((*self.left_out, *quantities.left_out)))
        if quantities.network is not None and quantities.left_out == self._covered:
            total = quantities.network
            parts[None] = SampleQuantities(total, total, first.confidence, curvature=quantities.network_curvature)
        for part, own in parts.items():
            self._parts[part].update(replace(own, curvature="hessian"))  # the label is kept here
            self._curved |= {part} if own.curvature == "ggn" else set()
        self.agree(self.numbers())

    def numbers(self) -> list[int]:
        """Return what processes exchange: their sums are to be given to `agree`."""
        code = crc32(repr(self._covered).encode()) >> 8 if self.samples else 0
        samples = [evaluation.samples for evaluation in self._parts.values()]
        return [
            self.samples,
            int(self.samples > 0),
            code,
            code**2,
            *samples,
            *(part in self._curved for part in self._parts),
        ]

    def agree(self, sums: Sequence[int]) -> None:
        """Take the values of all processes together that every one of them has.

        Args:
            sums: of the `numbers` of all processes.
        """
        total, processes, code, squares, *others = sums
        samples, curved = others[: len(self._parts)], others[len(self._parts) :]
        self._valid = {part for part, own in zip(self._parts, samples, strict=True) if own == total}
        self._curved = {part for part, own in zip(self._parts, curved, strict=True) if own}
        if processes * squares != code**2:  # they cover different parameters
            self._valid.discard(None)

    def by_part(self) -> dict[str | None, tuple[dict[str, Tensor], Curvature]]:
        """Return the values of each layer by key, and what they belong to; those of the network are under None.

        If samples are shared, every process has to call it.
        """
        return {
            part: (evaluation.compute(), "ggn" if part in self._curved else "hessian")
            for part, evaluation in self._parts.items()
            if part in self._valid
        }

    @property
    def distributions(self) -> dict[str, Tensor]:
        """The margins of all samples of all processes, after `common`; of several layers there is no one flatness."""
        return {name: values for name, values in self._common.distributions.items() if name == "margin"}

    def common(self) -> dict[str, Tensor]:
        """Return the values that do not belong to a layer by key; as `by_part`."""
        return self._common.compute()

    def compute(self) -> dict[str, Tensor]:
        """Return the value of every key; if samples are shared, every process has to call it, after `agree`."""
        values = {
            layer_key(key, part, curvature): value
            for part, (own, curvature) in self.by_part().items()
            for key, value in own.items()
        }
        return values | self.common()


class LayerExchange:
    """What processes tell each other about the layers of all loaders; nothing if a method measures a single layer.

    Args:
        recorder: of the network, with the same layers in every process; None: of a single layer.
        loaders: the number of loaders.

    Raises:
        ValueError: if a layer has the name under which the network has its key.
    """

    def __init__(self, recorder: Recorder | None, loaders: int) -> None:
        """Count the numbers, which every process has to give even if it has no evaluation."""
        self._width, self._loaders = 0, loaders
        if isinstance(recorder, LayersRecorder):
            if recorder.is_whole and NETWORK in recorder.layers:
                raise ValueError(
                    f'`layer="all"` has the key `{TRACE}/{NETWORK}` for the whole network; a layer has the name '
                    f"`{NETWORK}` as well. Rename it, or name the layers to measure."
                )
            self._width = _FACTS + 2 * (len(recorder.layers) + recorder.is_whole)

    def numbers(self, evaluations: Sequence[Evaluation | LayerEvaluation]) -> list[int]:
        """Return the numbers of this process, of all loaders."""
        found = [each for own in evaluations if isinstance(own, LayerEvaluation) for each in own.numbers()]
        return found or [0] * (self._width * self._loaders)

    def agree(self, evaluations: Sequence[Evaluation | LayerEvaluation], sums: Sequence[int]) -> None:
        """Let the evaluations take what all processes have, by the sums of their numbers."""
        for index, own in enumerate(evaluations):
            if isinstance(own, LayerEvaluation):
                own.agree(sums[index * self._width : (index + 1) * self._width])


def evaluation_of(
    recorder: Recorder | None, device: torch.device, method: str = "auto", is_shared: bool = True
) -> Evaluation | LayerEvaluation:
    """Return a new evaluation of what a recorder records: of several layers, or of one.

    Args:
        recorder: of the network; None: of a single layer.
        device: device of the network.
        method: name of the method, if there is a single layer.
        is_shared: whether the samples of all processes count together.
    """
    if isinstance(recorder, LayersRecorder):
        return LayerEvaluation(device, recorder.layers, recorder.is_whole, is_shared)
    return Evaluation(device, method, is_shared=is_shared)
