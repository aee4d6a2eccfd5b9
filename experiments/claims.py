"""Every claim with what the source says, what came out here, and the verdict that follows from the interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments import ablation, acting, choosing, detection, false_friend, onset, ranking
from experiments.detectors import BOTH, DEFAULT
from experiments.statistics import Estimate, mean, share

STRONG, WEAK, FALSE_ALARMS = 0.98, 0.8, 0.001
"""The aims of the alerts: detected shares, and false alarms per healthy validation."""
Test = Callable[[float], bool]


class Claim(NamedTuple):
    """A claim about one number.

    Attributes:
        page: of its experiment.
        text: the claim.
        source: the number of the source.
        found: ours.
        holds: whether a number agrees with the claim; must be monotonic.
    """

    page: str
    text: str
    source: str
    found: Estimate
    holds: Test

    @property
    def verdict(self) -> str:
        """Whether the whole interval agrees with the claim, none of it, or a part."""
        if not self.found.n or math.isnan(self.found.low):
            return "too few"
        ends = [self.holds(self.found.low), self.holds(self.found.high)]
        return "held" if all(ends) else "undecided" if any(ends) else "did not hold"


def of_margins(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.margins`."""
    page, rows = "margins", rows.dropna(subset="network_trace")
    names = {
        "logistic": "an affine predictor",
        "lenet": "LeNet-5",
        "mlp_norm": "a fully connected network",
    }
    for name, text in names.items():
        of_network = rows[rows.network == name]
        for key, quantity in (("aceht", "its classifier's trace (ACEHT)"), ("bound", "the margin bound")):
            yield Claim(
                page,
                f"Over the correct samples of {text}, the whole network's trace follows {quantity}: r of at least 0.8",
                "1 (identity)" if (name, key) == ("logistic", "aceht") else "r 0.8 to 1",
                mean(of_network[f"r_{key}_correct"].dropna()),
                lambda r: r >= 0.8,
            )
    last = rows[rows.validation == rows.validation.max()]
    pairs = last.pivot_table(index=["network", "seed"], columns="batch", values=["network_trace", "val_accuracy"])
    for key, text in (("network_trace", "a smaller trace"), ("val_accuracy", "a smaller validation accuracy")):
        below = pairs[key]["small"] < pairs[key]["large"]
        yield Claim(
            page,
            f"At equal steps, small batches end with {text} than large ones",
            "compared (table 1)",
            share(below.sum(), len(below)),
            lambda p: p > 0.5,
        )


def of_false_friend(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.false_friend`."""
    page, found = "false-friend", false_friend.fooled(rows)
    ways = {"l2": "L2", "averaging": "weight averaging", "sam": "SAM", "augmentation": "augmentation"}
    for way, text in ways.items():
        source = "sharper, yet better" if way in ("l2", "averaging") else "often sharper, yet better (arXiv 2510.12451)"
        for measure in ("trace of the network", "relative flatness"):
            yield Claim(
                page,
                f"The {measure} is wrong about {text} more often than right",
                source if measure.startswith("trace") else "none",
                found[way][measure],
                lambda p: p > 0.5,
            )
    ranks = rows.dropna(subset="layer_rank")
    yield Claim(
        page,
        "The rank of the last convolution's Hessian is at most its bound",
        "a bound",
        share((ranks.layer_rank <= ranks.layer_rank_bound).sum(), len(ranks)),
        lambda p: p > 0.5,
    )


def of_ranking(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.ranking`."""
    for data, group in ranking.by_data(rows):
        found = ranking.summary(group)
        yield Claim(
            "ranking",
            f"{data}: relative flatness and the test error of fitted networks correlate with r of at least 0.8",
            "r 0.89",
            found["relative"]["r, fitted"],
            lambda r: r >= 0.8,
        )
        for key in ("relative", "trace", "scale_free", "scale_free_margin", "perturbation"):
            for kind, text in (("sign error", "the family included"), ("within a family", "but not in the family")):
                yield Claim(
                    "ranking",
                    f"{data}: {ranking.full_name(key)} orders two networks that differ in one hyperparameter, {text}, "
                    "better than chance (sign error)",
                    "none",
                    found[key][kind],
                    lambda error: error < 0.5,
                )


def of_ablation(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.ablation`."""
    found = ablation.summary(rows)
    texts = {
        "without pooling": "Without the global pooling, {} orders two networks of a family",
        "width against depth": "{} orders two networks of equal size, one wide and one deep,",
    }
    for variant, text in texts.items():
        for key in ("flatness/relative", "flatness/trace", "flatness/scale_free", "margin/scale_free"):
            yield Claim(
                "ranking",
                f"{text.format(key)} better than chance (sign error)",
                "none",
                found[variant][key],
                lambda error: error < 0.5,
            )
    for key in ("flatness/relative", "flatness/trace", "flatness/scale_free", "margin/scale_free"):
        yield Claim(
            "ranking",
            f"A rescaling that changes no prediction leaves {key} as it is (median factor of the change)",
            "none",
            found[ablation.RESCALED][key],
            lambda factor: factor < 1.001,
        )


def of_onset(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.onset`."""
    delayed = onset.changes(rows)
    delayed = delayed[delayed.start == "delayed"]
    for name in ("relative flatness", "scale-free flatness", "proxy", "uncertainty", "head", "features", "alignment"):
        yield Claim(
            "onset",
            f"While a delayed training begins to generalize, its {name} falls (factor from fitted to end)",
            "falls" if name in ("relative flatness", "proxy") else "none",
            mean(delayed[name]),
            lambda factor: factor < 1,
        )


def of_alerts(judgements: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.alerts`."""
    page, held = "alerts", detection.of_selected(judgements, "held out")
    for name, text in ((DEFAULT, "The default rules"), (BOTH, "These and `misclassification` on training images")):
        rows = held[held.detector == name]
        for group, aim in (("strong", STRONG), ("weak", WEAK)):
            runs = detection.disturbed(rows, group)
            yield Claim(
                page,
                f"{text} find {group} disturbances within five validations",
                f"aim {aim:.0%}",
                share(runs.detected.sum(), len(runs)),
                lambda p, aim=aim: p >= aim,
            )
            other = detection.best_other(judgements, group)
            beside = detection.disturbed(held[held.detector == other], group)
            yield Claim(
                page,
                f"{text} find at least as many {group} disturbances as `{other}`, the best of the others on the tuning "
                "half at equal false alarms (difference)",
                "aim",
                paired(runs, beside),
                lambda difference: difference >= 0,
            )
        for where, healthy in (
            ("", detection.undisturbed(rows)),
            (" with warm restarts", detection.undisturbed(rows, restarts=True)),
        ):
            yield Claim(
                page,
                f"{text} give at most one false alarm in 1,000 validations of healthy trainings{where}",
                f"aim {FALSE_ALARMS:.1%}",
                share(healthy.alerts.sum(), healthy.validations.sum()),
                lambda p: p <= FALSE_ALARMS,
            )
        for cause, kinds in (("wrong labels", "labels"), ("the learning rate", "rate")):
            is_one = rows.kind.str.startswith(kinds) & (rows.optimizer != detection.RESTARTS)
            yield Claim(
                page,
                f"{text} name {cause} first where that was changed and detected",
                "none",
                detection.named(rows[rows.detected & is_one]),
                lambda p: p > 0.5,
            )


def paired(runs: pd.DataFrame, beside: pd.DataFrame) -> Estimate:
    """Return the mean difference of two detectors' detections, with an interval over the groups of runs."""
    detected = [each.set_index(["group", "kind"]).detected.astype(float) for each in (runs, beside)]
    return mean((detected[0] - detected[1]).groupby("group").mean().to_numpy())


def of_acting(rows: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.acting`."""
    runs = acting.with_gains(rows)
    is_healthy = runs.kind == "healthy"
    for action in acting.ACTIONS[1:]:
        for group, text in (
            (runs[~is_healthy], "raises the test accuracy after a disturbance"),
            (runs[is_healthy], "raises the test accuracy of a healthy training"),
        ):
            yield Claim(
                "acting",
                f"`{action}` {text} (mean difference)",
                "none",
                mean(group[group.action == action].gain.dropna().to_numpy()),
                lambda gain: gain > 0,
            )


def of_choosing(rows: pd.DataFrame, trained: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of `experiments.choosing`."""
    page, text = "choosing", "has a smaller test error than"
    for data, group in ranking.by_data(trained):
        found = choosing.networks(group)
        for key in ("flatness/relative", "flatness/scale_free", "margin/scale_free") if len(found) else ():
            yield Claim(
                page,
                f"Out of ten fitted networks on {data}, the one chosen by `{key}` {text} the one with the smallest "
                "training loss (mean difference)",
                "none",
                found["less training loss"][key],
                lambda gain: gain < 0,
            )
    kept, chosen = choosing.errors(rows)
    for metric, other in (("training accuracy", "the last"), ("val_accuracy", "val_accuracy")):
        for key in ("flatness/relative", "flatness/scale_free", "margin/scale_free"):
            yield Claim(
                page,
                f"The checkpoint chosen by {metric}, then `{key}`, {text} {_CHECKPOINTS[other]} (mean difference)",
                "none",
                mean((kept[f"{metric}, then {key}"] - kept[other]).to_numpy()),
                lambda gain: gain < 0,
            )
    for key in ("flatness/relative", "flatness/scale_free", "margin/scale_free"):
        yield Claim(
            page,
            f"The trial left by pruning with `{key}` {text} the one left by pruning with `val_loss` (mean difference)",
            "none",
            mean((chosen[key] - chosen["val_loss"]).to_numpy()),
            lambda gain: gain < 0,
        )


_CHECKPOINTS = {"the last": "the last one", "val_accuracy": "the one with the best validation accuracy"}


def as_markdown(table: pd.DataFrame, index: bool = True) -> str:
    """Return a table in Markdown, without another package."""
    frame = table.reset_index() if index else table
    cells = [[_text(value) for value in row] for row in frame.to_numpy(dtype=object)]
    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    if isinstance(value, Estimate) or not isinstance(value, float | np.floating):
        return str(value)
    return "" if math.isnan(value) else f"{value:.3g}"
