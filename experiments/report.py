"""Writes the tables and draws the figures of `docs/experiments` from the files in `results`.

    python -m experiments.report

A page has its words; what stands behind `<!-- results -->` is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import (
    ablation,
    acting,
    alerts,
    choosing,
    claims,
    costs,
    detection,
    detectors,
    false_friend,
    margins,
    onset,
    ranking,
)
from experiments.claims import Claim, as_markdown
from experiments.runs import results
from experiments.statistics import Estimate

PAGES = Path(__file__).parents[1] / "docs" / "experiments"
MARK = "<!-- results -->\n"
WIDTH, DPI = 8, 110
"""Of the figures: inches, and pixels per inch."""


def of_alerts() -> tuple[Figure, str]:
    """Return figure and tables of the alerts."""
    rows, judgements = results(alerts.NAME), results(detection.JUDGED)
    cost = results(detection.SPENT).set_index("detector").ms
    kinds = [*alerts.CHANGES, "memorisation"]
    held = detection.of_selected(judgements, "held out")
    runs = held[held.optimizer != detection.RESTARTS]
    detected = runs.pivot_table(index="detector", columns="kind", values="detected", sort=False)[kinds]
    detected = detected.reindex(detectors.names())
    alarms = detection.undisturbed(held).groupby("detector").apply(detection.per_thousand, include_groups=False)
    figure = heat_map(detected, "share detected")
    names = [f"{name}   {alarms[name]:.1f}" for name in detected.index]
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.axes[0].set_title(
        "detected in time; behind each name the false alarms per 1,000 healthy validations", fontsize=9
    )
    tables = [
        f"### {half.capitalize()} half\n\n" + as_markdown(detection.table(judgements, half, cost))
        for half in ("tuning", "held out")
    ]
    shown = results(costs.NAME)[["data", "network", *costs.SOURCES]]
    words = "Milliseconds of the processor for a validation: without anything, and what comes on top."
    tables.append(f"### Costs\n\n{words}\n\n{as_markdown(shown, index=False)}")
    return figure, "\n\n".join([counted(rows, alerts, [*alerts.GROUP, "kind"], alerts.GROUP), *tables])


def of_ranking() -> tuple[Figure, str]:
    """Return figure and tables of the ranking; the figure is that of the first data set."""
    rows = results(ranking.NAME)
    figures, parts = [], [counted(rows, ranking)]
    for data, group in ranking.by_data(rows):
        found = ranking.summary(group)
        order = sorted(found, key=lambda key: found[key]["sign error"].value)
        label = f"{data}: sign error over pairs that differ in one hyperparameter"
        figures.append(dots({ranking.full_name(key): found[key]["sign error"] for key in order}, label, 0.5))
        learnt = f"{len(group)} networks, {len(ranking.fitted(group))} of which have learnt their training images."
        table = pd.DataFrame({ranking.full_name(key): found[key] for key in order}).T.rename_axis("key")
        parts.append(f"### {data}\n\n{learnt}\n\n{as_markdown(table)}")
    rows = results(ablation.NAME)
    found = as_markdown(ablation.summary(rows))
    parts.append(f"### Pooling, shape and rescaling\n\n{counted(rows, ablation)}\n\n{found}")
    return figures[0], "\n\n".join(parts)


def of_margins() -> tuple[Figure, str]:
    """Return figure and tables of the margins."""
    rows = results(margins.NAME)
    measured = rows.dropna(subset="network_trace")
    columns = ["wrong", "network_trace", *(name for name in rows if name.startswith("r_"))]
    table = measured.groupby(["network", "batch", "validation"], sort=False)[columns].mean()
    table = table.rename(columns=lambda name: name.removeprefix("r_").replace("_", ", ") if name[:2] == "r_" else name)
    figure = Figure((WIDTH, 3), layout="constrained")
    names = {
        "r_aceht_correct": "r with ACEHT, correct samples",
        "r_bound_correct": "r with the bound, correct samples",
        "r_aceht_wrong": "r with ACEHT, wrong samples",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), names.items(), strict=True):
        for (network, batch), group in measured.groupby(["network", "batch"], sort=False):
            line = group.groupby("validation")[name].mean()
            axes.plot(
                line.index, line, marker="o", linestyle="-" if batch == "small" else "--", label=f"{network}, {batch}"
            )
        axes.set(title=title, xlabel="validation", ylim=(0, 1.05))
    figure.axes[0].legend(fontsize=6)
    last = rows[rows.validation == rows.validation.max()]
    shown = ["val_loss", "val_accuracy", "margin/skewness", "flatness/margin_share"]
    ends = last.groupby(["network", "batch"], sort=False)[shown].mean()
    heading = "### At the end, small against large batches\n\n"
    return figure, "\n\n".join(
        [counted(rows, margins, ["data", "network", "batch", "seed"]), as_markdown(table), heading + as_markdown(ends)]
    )


def of_false_friend() -> tuple[Figure, str]:
    """Return figure and tables of the false friend."""
    rows = results(false_friend.NAME)
    table = false_friend.fooled(rows)
    figure = heat_map(table.map(lambda estimate: estimate.value), "share of networks")
    shown = [
        "test_error",
        "training_loss",
        "trace",
        "frobenius_norm",
        "spectral_norm",
        "flatness/relative",
        "flatness/scale_free",
    ]
    ranks = ["layer_rank", "layer_rank_bound"]
    ways = rows.groupby(["network", "way"], sort=False)[[*shown, *ranks]].mean()
    return figure, "\n\n".join([counted(rows, false_friend), as_markdown(table), "### Means\n\n" + as_markdown(ways)])


def of_onset() -> tuple[Figure, str]:
    """Return figure and tables of the onset."""
    rows = results(onset.NAME)
    rows = onset.with_proxy(rows)
    figure = Figure((WIDTH, 3.4), layout="constrained")
    for axes, start in zip(figure.subplots(1, 2, sharey=True), onset.SCALES, strict=True):
        run = rows[(rows.start == start) & (rows.seed == 0)]
        for name, key in onset.KEYS.items():
            axes.semilogy(run.step, run[key] / run[key].iloc[0], label=name)
        right = axes.twinx()
        right.plot(run.step, run.training_accuracy, "k:", label="training accuracy")
        right.plot(run.step, run.val_accuracy, "k-", label="validation accuracy")
        right.set(ylim=(0, 1.02))
        axes.set(title=start, xlabel="step")
    figure.axes[0].set_ylabel("relative to the first validation")
    figure.axes[0].legend(fontsize=6, loc="lower left")
    right.legend(fontsize=6, loc="lower right")
    table = onset.changes(rows).T.reset_index(names="from fitted to end: factor")
    return figure, f"{counted(rows, onset, ['data', 'start', 'seed'])}\n\n{as_markdown(table, index=False)}"


def of_acting() -> tuple[Figure, str]:
    """Return figure and tables of acting and choosing."""
    rows = results(acting.NAME)
    table = acting.gains(rows)
    shown = table[table.action != "none"]
    names = [f"{kind}, {action}" for kind, action in zip(shown.kind, shown.action, strict=True)]
    figure = dots(dict(zip(names, shown.gain, strict=True)), "gain of test accuracy over no action", 0.0)
    parts = [counted(rows, acting), as_markdown(table, index=False)]
    return figure, "\n\n".join(parts)


def of_choosing() -> tuple[Figure, str]:
    """Return figure and tables of choosing; the figure is that of the trials."""
    rows, trained = results(choosing.NAME), results(ranking.NAME)
    kept, chosen = (
        choosing.table(errors, reference)
        for errors, reference in zip(choosing.errors(rows), ("training loss", "val_loss"), strict=True)
    )
    ends = chosen["test error"].to_dict()
    figure = dots(ends, "test error of the trial that is left", ends["any (mean)"].value)
    parts = [counted(rows, choosing, ["data", "wrong_labels", "trial", "seed"])]
    for data, group in ranking.by_data(trained):
        if len(found := choosing.networks(group)):
            parts.append(f"### One of ten fitted networks: {data}\n\n{as_markdown(found)}")
    parts.append(f"### A checkpoint of a training\n\n{as_markdown(kept)}")
    parts.append(f"### A trial of a search, by pruning\n\n{as_markdown(chosen)}")
    return figure, "\n\n".join(parts)


SECTIONS: dict[str, Callable[[], tuple[Figure, str]]] = {
    "alerts": of_alerts,
    "ranking": of_ranking,
    "margins": of_margins,
    "false-friend": of_false_friend,
    "onset": of_onset,
    "acting": of_acting,
    "choosing": of_choosing,
}


def all_claims() -> list[Claim]:
    """Return all claims, in the order of the papers."""
    trained = results(ranking.NAME)
    return [
        *claims.of_margins(results(margins.NAME)),
        *claims.of_false_friend(results(false_friend.NAME)),
        *claims.of_ranking(trained),
        *claims.of_ablation(results(ablation.NAME)),
        *claims.of_onset(onset.with_proxy(results(onset.NAME))),
        *claims.of_alerts(results(detection.JUDGED)),
        *claims.of_acting(results(acting.NAME)),
        *claims.of_choosing(results(choosing.NAME), trained),
    ]


def counted(
    rows: pd.DataFrame, experiment: ModuleType, run: list[str] | None = None, timed: list[str] | None = None
) -> str:
    """Return how many runs of the full design there are, of which seeds, with which versions, and their time.

    Args:
        rows: of a file.
        experiment: whose file it is.
        run: columns that identify a run; None: a row is one.
        timed: columns that identify what was timed together; None: a run.
    """
    runs = rows.drop_duplicates(run) if run else rows
    minutes = rows.drop_duplicates(timed).seconds.sum() / 60 if timed else runs.seconds.sum() / 60
    seeds = ", ".join(map(str, sorted(runs.seed.unique())))
    versions = "; ".join(rows.versions.unique())
    designed = len(list(experiment.tasks())) * (len(alerts.KINDS) if experiment is alerts else 1)
    return (
        f"{len(runs)} of {designed} runs, with the seeds {seeds}, in {minutes:.0f} minutes of a core that others used "
        f"too. {versions}."
    )


def heat_map(table: pd.DataFrame, label: str) -> Figure:
    """Return a figure of shares, with their numbers in the cells."""
    figure = Figure((WIDTH, 1.2 + 0.32 * len(table)), layout="constrained")
    axes, values = figure.subplots(), table.to_numpy(dtype=float)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(table.shape[1]), table.columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(table)), table.index, fontsize=8)
    for row, column in np.argwhere(~np.isnan(values)):
        shade = "white" if values[row, column] > 0.6 else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, label=label)
    return figure


def dots(estimates: dict[str, Estimate], label: str, reference: float) -> Figure:
    """Return a figure of numbers with their intervals, and a line at a reference."""
    figure = Figure((WIDTH, 1 + 0.24 * len(estimates)), layout="constrained")
    axes = figure.subplots()
    for row, estimate in enumerate(estimates.values()):
        axes.plot([estimate.low, estimate.high], [row, row], color="#0072B2")
        axes.plot(estimate.value, row, "o", color="#0072B2")
    axes.axvline(reference, color="#D55E00", linestyle="--")
    axes.set_yticks(range(len(estimates)), estimates, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure


def write(page: str, text: str) -> None:
    """Replace what stands behind the mark of a page."""
    path = PAGES / f"{page}.md"
    words = path.read_text(encoding="utf-8").split(MARK)[0]
    path.write_text(f"{words}{MARK}\n{text}\n", encoding="utf-8")


def main() -> None:
    """Write all pages."""
    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for page, section in SECTIONS.items():
        figure, text = section()
        figure.savefig(PAGES / f"{page}.png", dpi=DPI, metadata={"Software": None})
        write(page, text)
    rows = [
        {
            "claim": f"[{claim.text}]({claim.page}.md)",
            "source": claim.source,
            "here": str(claim.found),
            "verdict": claim.verdict,
        }
        for claim in all_claims()
    ]
    write("index", as_markdown(pd.DataFrame(rows), index=False))


if __name__ == "__main__":
    main()
