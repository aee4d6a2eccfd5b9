"""What the monitor costs, in one run: prints tables and writes `docs/reference/performance.md`.

`python benchmarks/bench.py [--rounds N] [PART ...]`; the parts are the keys of `PARTS` at the end, by default all.
Ratios are medians over rounds in which everything is called in turn; beside them stand those of the shortest times.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cuda_validation
import networks
import sizes
import torch
import torch.nn.functional as F
from multiply_adds import multiply_adds
from peers import installed, prepared
from timing import THREADS, best_ratio, interleaved, printed, ratio
from torch import Tensor, nn
from training import trained_on_digits
from validation import SETTINGS
from whole_network import ways

from lightning_flatness import ForwardRecorder, PooledMethod, measure
from lightning_flatness.curvature.pooled.closed_form import hessian_trace, relative_flatness
from lightning_flatness.curvature.pooled.derivatives import PooledDerivatives

ALONE, SIZES = (Path(__file__).with_name(name) for name in ("alone.py", "sizes.py"))
GLIBC = platform.libc_ver()[0] == "glibc"
# Give no memory back to the system, which would have to clear it and hand it out anew; from glibc 2.35 on.
PAGES_KEPT = "glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=17179869184"
KEPT = {"GLIBC_TUNABLES": PAGES_KEPT} if GLIBC else {}
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "performance.md"
PACKAGES = "asdfghjkl backpack-for-pytorch curvlinops-for-pytorch hessian-eigenthings PyHessian".split()
Rows = Iterator[tuple[str, ...]]


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a plain forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def derivatives_of(model: nn.Module, x: Tensor, y: Tensor) -> PooledDerivatives:
    """Return the derivatives of one pass."""
    with ForwardRecorder(model) as recorder, torch.no_grad():
        return PooledMethod().derivatives(recorder.take_pass(F.cross_entropy(model(x), y)))


def validations(rounds: int) -> Rows:
    """Yield validation time and peak memory with the monitor, as multiples of those without."""
    yield "network", "samples", "batch", "time", "shortest", "pages kept", "counted", "peak memory", "target"
    for name, target in (("resnet20", 1.05), ("resnet18", 1.03), ("resnet18-stem", 1.03)):
        setting = SETTINGS[name]
        both, shortest = printed(ALONE, "time", name, rounds)
        kept = f"{printed(ALONE, 'time', name, rounds, GLIBC_TUNABLES=PAGES_KEPT)[0]:.3f}" if GLIBC else "-"
        (with_it,), (without,) = (printed(ALONE, "memory", name, monitored) for monitored in (1, 0))
        model = networks.lively(setting.network())
        x, y = torch.randn(8, 3, setting.side, setting.side), torch.zeros(8).long()
        derivatives = derivatives_of(model, x, y)
        share = multiply_adds(lambda: relative_flatness(derivatives)) / multiply_adds(forward(model, x))  # noqa: B023
        yield (
            setting.title,
            f"{setting.samples:,}",
            f"{setting.batch}",
            f"{both:.3f}",
            f"{shortest:.3f}",
            kept,
            f"{1 + share:.3f}",
            f"{with_it / without:.3f} of {without:.0f} MB",
            f"{target}",
        )


def against_peers(rounds: int) -> Rows:
    """Yield time as a multiple of a forward pass, and error, of every way to the trace of the last convolution."""
    yield "trace of the last convolution's Hessian", "exact", "untrained x fwd", "error", "trained x fwd", "error"
    one, ten = "this package, `measure` of one batch: all quantities", "the same, of ten batches"
    columns: dict[str, list[str]] = {}
    for model, x, y in trained_on_digits():
        report = measure(model, [(x, y)])
        exact = measure(model.double(), [(x.double(), y)]).hessian_trace
        model.float()
        runs: dict[str, Callable[[], object]] = {
            "forward": forward(model, x),
            one: partial(measure, model, [(x, y)]),
            ten: partial(measure, model, [(x, y)] * 10),
        }
        errors = dict.fromkeys((one, ten), abs(report.hessian_trace / exact - 1))
        for peer in installed():
            runs[peer.name] = partial(peer.trace, prepared(model, report.layer), report.layer, x, y)
            values = [float(str(runs[peer.name]())) for _ in range(1 if peer.exact else 5)]
            errors[peer.name] = sum(abs(value / exact - 1) for value in values) / len(values)
        times = interleaved(runs, rounds)
        times[ten] = [total / 10 for total in times[ten]]
        for name, error in errors.items():
            kind = "yes" if name not in {p.name for p in installed() if not p.exact} else "no"
            columns.setdefault(name, [kind]).extend([f"{ratio(times[name], times['forward']):.2f}", f"{error:.1e}"])
    for name, cells in columns.items():
        yield name, *cells


def any_layer(rounds: int) -> Rows:
    """Yield time as a multiple of a forward pass, memory and error, of single layers and of the whole network."""
    yield "trace of the Hessian, 256 images", "x fwd", "shortest", "target", "memory", "error"
    numbers = printed(ALONE, "layers", rounds, **KEPT)
    for (name, way), median, shortest, error in zip(ways().items(), *(numbers[i::3] for i in range(3)), strict=True):
        (megabytes,) = printed(ALONE, "layer_memory", name)
        yield name, f"{median:.1f}", f"{shortest:.1f}", way.target, f"{megabytes:.0f} MB", f"{error:.1e}"


def four_sizes(rounds: int) -> Rows:
    """Yield what the monitor costs in networks of four sizes; write the raw data, and draw them."""
    for name in sizes.SIZES:
        for mode in sizes.MODES:
            printed(SIZES, name, mode, rounds, **KEPT)
    sizes.draw()
    yield from sizes.table()


def compiled(rounds: int) -> Rows:
    """Yield what a whole validation of a compiled network takes, as a multiple of an unmonitored one."""
    yield "compiled ResNet-20, 10 batches of 64", "ratio", "lowest and highest pair", "target"
    for title, max_samples, target in (("all samples", 0, 1.20), ("`max_samples` of one batch in ten", 64, 1.10)):
        middle, low, high = printed(ALONE, "compiled", max_samples, rounds, **KEPT)
        yield title, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{target:.2f}"


def large_tail(rounds: int) -> Rows:
    """Yield what 1000 classes and 2048 filters cost, as multiples of a forward pass, that pass included."""
    yield "ResNet-50, 224 x 224, C = 1000, K = 2048", "x fwd", "shortest", "counted", "target"
    model, x, y = networks.lively(networks.resnet50()), torch.randn(4, 3, 224, 224), torch.zeros(4).long()
    method, recorder = PooledMethod(), ForwardRecorder(model)

    def run(quantity: Callable[[PooledDerivatives], object]) -> None:
        with recorder, torch.no_grad():  # a plain forward pass in turn with it is not to be recorded
            quantity(method.derivatives(recorder.take_pass(F.cross_entropy(model(x), y))))

    quantities = {"trace alone": (hessian_trace, 1.05), "relative flatness": (relative_flatness, 1.5)}
    runs: dict[str, Callable[[], object]] = {title: partial(run, of) for title, (of, _) in quantities.items()}
    times = interleaved(runs | {"forward": forward(model, x)}, rounds)
    derivatives, counted = derivatives_of(model, x, y), multiply_adds(forward(model, x))
    for title, (of, target) in quantities.items():
        share = 1 + multiply_adds(partial(of, derivatives)) / counted
        pair = times[title], times["forward"]
        yield title, f"{ratio(*pair):.2f}", f"{best_ratio(*pair):.2f}", f"{share:.2f}", f"{target}"


def tail(channels: int, filters: int, side: int, classes: int, kernel: int = 3) -> nn.Module:
    """Return a last convolution and what follows it."""
    layers = [networks.conv_norm(channels, filters, kernel), nn.ReLU(), *networks.head(filters, classes)]
    return networks.lively(nn.Sequential(*layers))


def growth(rounds: int) -> Rows:
    """Yield the monitor's cost of one sample as one size grows."""
    yield "what grows", "sizes", "microseconds per sample", "millions of multiply-adds"
    n = 8
    sizes: dict[str, dict[int, tuple[int, int, int, int, int]]] = {
        "classes, K = 512, 7 x 7": {c: (512, 512, 7, c, 3) for c in (10, 100, 1000)},
        "channels in and out, 3 x 3 kernel, 7 x 7": {k: (k, k, 7, 10, 3) for k in (64, 256, 1024, 2048)},
        "map's side, K = 64": {s: (64, 64, s, 10, 3) for s in (4, 8, 16, 28, 56)},
    }
    for title, cases in sizes.items():
        costs, counts = [], []
        for channels, filters, side, classes, kernel in cases.values():
            model = tail(channels, filters, side, classes, kernel)
            derivatives = derivatives_of(model, torch.randn(n, channels, side, side), torch.zeros(n).long())
            own = partial(relative_flatness, derivatives)
            costs.append(f"{min(interleaved({'': own}, rounds)['']) / n * 1e6:.0f}")
            counts.append(f"{multiply_adds(own) / n / 1e6:.1f}")
        yield title, " / ".join(map(str, cases)), " / ".join(costs), " / ".join(counts)
    model, costs, counts = networks.lively(networks.resnet18(10)), [], []
    for side in (64, 128, 224):
        x, y = torch.randn(n, 3, side, side), torch.zeros(n).long()
        own = partial(relative_flatness, derivatives_of(model, x, y))
        times = interleaved({"fwd": forward(model, x), "own": own}, rounds)
        counts.append(f"{multiply_adds(own) / n / 1e6:.1f}")
        costs.append(f"{min(times['own']) / n * 1e6:.0f} ({best_ratio(times['own'], times['fwd']):.1%} of fwd)")
    yield "image's side, ResNet-18", "64 / 128 / 224", " / ".join(costs), " / ".join(counts)


def samples(rounds: int) -> Rows:
    """Yield time per sample and peak memory of `measure` as the set grows."""
    yield "samples", "microseconds per sample", "peak memory, MB"
    for count in (256, 2560, 50176):
        took, megabytes = printed(ALONE, "samples", count)
        yield f"{count}", f"{took * 1e6:.0f}", f"{megabytes:.0f}"


PARTS: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "validation": ("A whole validation by a Trainer, with the monitor / without", validations),
    "peers": ("Against other packages", against_peers),
    "sizes": ("Networks of four sizes, eager and compiled", four_sizes),
    "compiled": ("A whole validation of a compiled network", compiled),
    "layers": ("Any layer and the whole network", any_layer),
    "large": ("Many classes, many filters", large_tail),
    "growth": ("Growth of the cost of one sample", growth),
    "samples": ("Growth with the number of samples", samples),
    "cuda": ("On a CUDA device", lambda rounds: cuda_validation.rows()),
}


def table(rows: Rows) -> str:
    """Return rows as a Markdown table."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions() -> str:
    """Return date, machine and versions."""
    versions = [f"torch {torch.__version__}", f"lightning {version('lightning')}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{date.today().isoformat()}; {os.cpu_count()} {platform.machine()} cores, {device}; "
        f"Python {platform.python_version()}; {', '.join(versions)}."
    )


def main() -> None:
    """Run the parts that were asked for and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *PARTS], default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    for part in arguments.parts or PARTS:
        title, rows = PARTS[part]
        text = f"{table(rows(arguments.rounds))}\n\n{conditions()}"
        print(f"\n{title}\n\n{text}", flush=True)
        write(part, text)
        gc.collect()


def write(part: str, text: str) -> None:
    """Put a table between its marks on the page; the text around them stays."""
    page = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- {part} -->\n", f"\n<!-- /{part} -->"
    before, rest = page.split(start)
    PAGE.write_text(f"{before}{start}{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
