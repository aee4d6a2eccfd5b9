"""What the validations of a training say about each sample: the sharpest, the least certain, the suspicious ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.data.churn import weakly_held

_SHOWN = 5  # rows of each table


class Sample(NamedTuple):
    """One sample, as the validations of a training saw it.

    Attributes:
        index: where it is: in the data set of the training loader for `data="train"`, else its position in the
            validation loader or in the given batches.
        area: area under the margin: its signed output margin, averaged over the validations; logit.
        margin: its signed output margin in the last validation; logit.
        relative_flatness: its relative flatness in the last validation; unit of the loss.
        confidence: its uncertainty `1 - |S|^2` in the last validation; no unit.
    """

    index: Any
    area: float
    margin: float
    relative_flatness: float
    confidence: float


class _Sums(NamedTuple):
    """What is kept of one loader.

    Attributes:
        source: returns what yields the samples; None if it is gone.
        indices: of the samples, at least n.
        validations: number of validations in the sum.
        area: sum of the margins, shape (n,).
        last: margin, relative flatness and uncertainty in the last validation, shape (3, n).
    """

    source: Callable[[], Any]
    indices: Sequence[Any]
    validations: int
    area: Tensor
    last: Tensor


class SampleHistory:
    r"""The samples that this process measured in the validations of a training, for each loader.

    A sample whose label is wrong competes with the samples that look like it: its margin stays low while theirs grow.
    The area under the margin \(\frac{1}{T} \sum_t \gamma_{tn}\) of sample n over the validations t = 1, ..., T finds
    it. It needs the same samples in the same order in every validation, so that there is none where a loader shuffles;
    it starts anew where a loader is replaced. Running sums are kept: four numbers for each sample, in float64.

    Source: Pleiss et al., "Identifying mislabeled data using the area under the margin ranking", NeurIPS 2020; there in
    every epoch, in training mode.

    Example:
        >>> import torch
        >>> from lightning_flatness import SampleQuantities
        >>> history, batches = SampleHistory(), [...]
        >>> for margins in ([4.0, -1.0], [6.0, -3.0]):
        ...     flat = torch.tensor([0.5, 2.0])
        ...     history.start()
        ...     history.add(0, SampleQuantities(flat, flat, flat / 4, output_margin=torch.tensor(margins)))
        ...     history.finish(0, batches, lambda: range(2))
        >>> history.suspicious(1)
        [Sample(index=1, area=-2.0, margin=-3.0, relative_flatness=2.0, confidence=0.5)]
    """

    def __init__(self) -> None:
        """Start without a validation."""
        self._now: dict[int, list[Tensor]] = {}
        self._known: dict[int, _Sums] = {}

    def start(self) -> None:
        """Begin a validation."""
        self._now = {}

    def add(self, loader: int, quantities: SampleQuantities) -> None:
        """Add a batch of a loader; a loss without margins has no table."""
        if quantities.output_margin is None:
            return
        values = quantities.output_margin, quantities.relative_flatness, quantities.confidence
        rows = torch.stack([value.detach() for value in values])
        rows = rows.cpu() if rows.device.type == "mps" else rows  # which has no float64
        self._now.setdefault(loader, []).append(rows.double())

    def finish(self, loader: int, source: Any, indices: Callable[[], Sequence[Any] | None]) -> None:
        """Add this validation of a loader to the sums.

        Args:
            loader: its index.
            source: what yields the samples in a fixed order; None if the order may change.
            indices: returns the indices of the samples in this order; None if they are not known.
        """
        parts, known = self._now.pop(loader, []), self._known.pop(loader, None)
        if not parts or source is None:
            return
        last = torch.cat(parts, 1)
        if known is not None and known.source() is source and known.last.shape == last.shape:
            area, validations = known.area + last[0], known.validations + 1
            self._known[loader] = known._replace(validations=validations, area=area, last=last)
        elif (found := indices()) is not None:
            self._known[loader] = _Sums(weakly_held(source), found, 1, last[0].clone(), last)

    def suspicious(self, count: int = 10, loader: int = 0) -> list[Sample]:
        """Return the samples with the smallest area under the margin, smallest first: look at their labels.

        Args:
            count: how many.
            loader: index of the validation loader.

        Raises:
            ValueError: if nothing is known about this loader.
        """
        return self._ordered(lambda known: known.area, count, loader)

    def sharpest(self, count: int = 10, loader: int = 0) -> list[Sample]:
        """Return the samples with the largest relative flatness in the last validation, largest first."""
        return self._ordered(lambda known: -known.last[1], count, loader)

    def least_certain(self, count: int = 10, loader: int = 0) -> list[Sample]:
        """Return the samples with the largest uncertainty in the last validation, largest first."""
        return self._ordered(lambda known: -known.last[2], count, loader)

    def __str__(self) -> str:
        """Return the first samples of each kind as tables."""
        lines = [] if self._known else ["No samples: none was measured in a fixed order."]
        for loader, known in sorted(self._known.items()):
            lines.append(f"Loader {loader}: {known.area.numel()} samples in {known.validations} validations")
            for choose in (self.suspicious, self.sharpest, self.least_certain):
                title = choose.__name__.replace("_", " ")
                lines.append(f"{title:<14}{'area':>10}{'margin':>10}{'flatness':>12}{'1 - |S|^2':>12}")
                lines += [
                    f"{each.index!s:>14}{each.area:>10.3g}{each.margin:>10.3g}{each.relative_flatness:>12.3g}"
                    f"{each.confidence:>12.3g}"
                    for each in choose(_SHOWN, loader)
                ]
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the samples, and neither the loaders nor what a validation is about to add."""
        gone = {loader: known._replace(source=_nothing) for loader, known in self._known.items()}
        return {"_now": {}, "_known": gone}

    def _ordered(self, by: Callable[[_Sums], Tensor], count: int, loader: int) -> list[Sample]:
        if (known := self._known.get(loader)) is None:
            raise ValueError(
                f"The samples of a loader must be measured in the same order in every validation; loader {loader} has "
                f"none that were, known are {sorted(self._known)}. Let the validation loader read in order (no "
                "`shuffle=True`, no sampler of an unknown kind), and let `fit` run a validation."
            )
        chosen = by(known).argsort(stable=True)[:count].tolist()
        areas, last = (known.area / known.validations).tolist(), known.last.tolist()
        return [Sample(known.indices[n], areas[n], *(row[n] for row in last)) for n in chosen]


def _nothing() -> None:
    """Return what a source is that is gone."""
