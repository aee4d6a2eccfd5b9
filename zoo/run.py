"""Measures every architecture of the zoo against the reference, and compares the outcome with the documented one.

python zoo/run.py [NAME ...]     these, or all, against docs/reference/zoo.md; a difference fails
python zoo/run.py --write        all, and writes the table into docs/reference/zoo.md
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import operators  # noqa: F401  first: torchvision cannot be imported without it
import torch
from models import ARCHITECTURES, CLASSES, Architecture, generic
from reference import Flatness, logits_of, terms
from torch import Tensor, nn

from lightning_flatness import FlatnessReport, UnsupportedTailError, measure

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "zoo.md"
MARK = "<!-- table -->\n"
HEADING = ("library", "architecture", "method", "layer", "float64", "float32", "float32 logits", "why no convolution")
SAMPLES, WORKERS = 2, 2
BOUND_DOUBLE, BOUND_SINGLE = 1e-8, 1e-4


class Row(NamedTuple):
    """One line of the table; the errors are None for a network that was refused."""

    architecture: Architecture
    method: str  # or "refused"
    layer: str
    reason: str  # why no convolution is measured
    double: float | None = None
    single: float | None = None
    single_logits: float | None = None  # how far float32 moves the network's own logits

    @property
    def wrong(self) -> bool:
        """Whether a number came out that is not the right one, or not a number."""
        if self.double is None:
            return False
        return not (self.double <= BOUND_DOUBLE and self.single <= max(BOUND_SINGLE, 10 * self.single_logits))

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        errors = (self.double, self.single, self.single_logits)
        numbers = ("" if error is None else f"{error:.0e}" for error in errors)
        layer = f"`{self.layer}`" if self.layer else ""
        return (self.architecture.library, self.architecture.name, self.method, layer, *numbers, self.reason)

    @property
    def outcome(self) -> tuple[str, str]:
        """What must be as documented."""
        return self.cells[2:4]


def alone() -> None:
    """Prepare a process: one of several, and quiet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def examine(architecture: Architecture) -> Row:
    """Measure one architecture in float64 and float32, and compare with the reference."""
    model = generic(architecture)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, *architecture.shape, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    try:
        report, double = measured(model.double(), images.double(), labels)
    except UnsupportedTailError as error:
        return Row(architecture, "refused", "", shortened(str(error)))
    model.requires_grad_(False)  # fused attention cannot differentiate all that it is given
    expected, logits = terms(model, report.layer, images.double(), labels), predicted(model, images.double())
    model.requires_grad_(True)
    again, single = measured(model.float(), images, labels)
    if again.layer != report.layer:
        raise AssertionError(f"{architecture.name}: `{report.layer}` in float64, `{again.layer}` in float32.")
    rounding = float((predicted(model, images) - logits).norm() / logits.norm())
    errors = error_of(double, expected), error_of(single, expected), rounding
    reason = "" if report.method == "pooled" else shortened(report.reason)
    return Row(architecture, report.method, report.layer, reason, *errors)


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        return logits_of(model(images))


def measured(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[FlatnessReport, Flatness]:
    """Return the report of the layer that the package chooses, and its numbers per sample."""

    def loss(output: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(output), targets)

    report = measure(model, [(images, labels)], loss=loss, per_sample=True)
    return report, Flatness(report.samples["hessian_trace"], report.samples["relative_flatness"])


def error_of(value: Flatness, expected: tuple[Flatness, Flatness]) -> float:
    """Return the largest error of both numbers in all samples, relative to the two terms that make them."""
    errors = [
        (ours.double() - first - second).abs() / (first.abs() + second.abs())
        for ours, first, second in zip(value, *expected, strict=True)
    ]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def shortened(reason: str) -> str:
    """Return what a reason says about this network in particular."""
    return reason.splitlines()[0].split("pooling): ")[-1].rstrip(".")


def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """Return the outcome of each architecture in the table of the documentation."""
    lines = PAGE.read_text(encoding="utf-8").split(MARK)[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {(library, name): (method, layer) for library, name, method, layer, *_ in cells[2:]}


def write(rows: list[Row]) -> None:
    """Replace the table in the documentation."""
    lines = [HEADING, ("---",) * len(HEADING), *(row.cells for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{text}{MARK}{summary(rows)}\n\n{table}\n", encoding="utf-8")


def summary(rows: list[Row]) -> str:
    """Return the counts in one line."""
    counts = Counter(row.method for row in rows)
    return (
        f"{len(rows)} architectures: " + ", ".join(f"{count} {method}" for method, count in counts.most_common()) + "."
    )


def main() -> int:
    """Return 0 if no number is wrong and every outcome is the documented one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", help="architectures to measure (default: all)")
    parser.add_argument("--write", action="store_true", help="write the outcomes into docs/reference/zoo.md instead")
    options = parser.parse_args()
    chosen = [each for each in ARCHITECTURES if not options.name or each.name in options.name]
    rows = []
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), alone) as pool:
        for row in pool.map(examine, chosen):
            rows.append(row)
            print(*row.cells, "WRONG" * row.wrong, sep="  ", flush=True)
    faults = [f"{row.architecture.name}: wrong" for row in rows if row.wrong]
    if options.write:
        write(rows)
    else:
        known = documented()
        for row in rows:
            library, name, *_ = row.architecture
            if known.get((library, name)) != row.outcome:
                faults.append(f"{library} {name}: {row.outcome}; the page has: {known.get((library, name))}")
    print(summary(rows), *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
