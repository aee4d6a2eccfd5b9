"""Explains an alert in English, from its numbers; the only place that does. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_flatness.keys import (
    ALIGNMENT,
    CHURN,
    CONFIDENCE,
    FACTORS,
    FEATURES,
    HEAD,
    KERNEL,
    LEARNING_RATE,
    MARGIN,
    NEGATIVE,
    RELATIVE,
    SCALE_FREE,
    TRACE,
    key_suffix,
)

if TYPE_CHECKING:  # an alert explains itself
    from lightning_flatness.rules.alert import Alert, Violation

Severity = Literal["info", "warning", "critical"]

_LEVELS = {
    "settled": "the settled level",
    "best": "the lowest value so far",
    "ema": "the moving average",
    "previous": "the previous value",
}
# These change with the scale of the weights alone.
_SCALED = (TRACE, HEAD, KERNEL, FEATURES)
_NEGLIGIBLE = 0.1  # of the change to be explained, both in log
_NOTICEABLE = math.log(1.1)
# Rise of scale-free flatness that tells wrong labels from too high a learning rate if that is not known, see
# docs/how-to/alerts.md.
_SHARPENED = math.log(1.5)
# What it means when a value rises, and when it falls.
_WORDS = {
    RELATIVE: ("sharper", "flatter"),
    TRACE: ("larger curvature", "smaller curvature"),
    SCALE_FREE: ("sharper at any logit scale", "flatter at any logit scale"),
    CONFIDENCE: ("predictions less sure", "predictions more sure"),
    HEAD: ("larger classifier weights", "smaller classifier weights"),
    KERNEL: ("larger filters", "smaller filters"),
    FEATURES: ("larger features", "smaller features"),
    ALIGNMENT: ("filters act more on the same classes", "filters act less on the same classes"),
    MARGIN: ("larger margins", "smaller margins"),
    NEGATIVE: ("more samples misclassified", "fewer samples misclassified"),
    CHURN: ("more predictions change", "fewer predictions change"),
}


class Advice(NamedTuple):
    """What usually causes a change of one kind, and what to look at next."""

    causes: str = ""
    look_at: str = ""


_LABELS = Advice(
    "labels that turned wrong (a changed mapping of classes, a damaged part of the data), or inputs that no longer "
    "match their labels",
    "training images with their labels as the network gets them, and what changed in the data since the onset",
)
_RATE = Advice(
    "a learning rate that became too high (a warm restart, a schedule resumed wrongly), or a few very large gradients",
    "learning rate, training loss and gradient norm since the onset; a checkpoint from before it",
)
# What throws a training back: the likelier cause first, never alone; see docs/experiments/alerts.md.
_THROWN_BACK_BY_LABELS = Advice(
    f"{_LABELS.causes}; or a learning rate that became too high", f"{_LABELS.look_at}; the learning rate"
)
_THROWN_BACK_BY_RATE = Advice(
    f"{_RATE.causes}; or labels that turned wrong", f"{_RATE.look_at}; training images with their labels"
)
_MEMORISED = Advice(
    "wrong training labels that the network learns by heart, or too little data; a healthy training that is slow and "
    "still unsure looks the same",
    "accuracy on training and on validation data, and the most suspicious samples",
)
_UNSURE = Advice(
    "labels or inputs that changed, a learning rate that was raised, stronger augmentation or regularisation",
    "the learning rate, if it rose; scale-free flatness often rises after wrong labels and falls after too high a rate",
)
_SURE = Advice(
    "a network that fits its data better and better; with a validation loss that rises, over-confidence",
    "validation loss and calibration",
)
_GROWN = Advice(
    "weights that grow: little weight decay, none on this layer, or a higher learning rate",
    "weight decay and its exceptions, and whether scale-free flatness moved at all",
)
_SHRUNK = Advice("weight decay, or a learning rate that changed", "weight decay, and whether the margins shrink too")
# By the value that moved, and whether it rose.
_ADVICE = {
    (CONFIDENCE, True): _UNSURE,
    (CONFIDENCE, False): _SURE,
    (MARGIN, True): _SURE,
    (MARGIN, False): _UNSURE,
    (NEGATIVE, True): _UNSURE,
    (NEGATIVE, False): _SURE,
    (SCALE_FREE, True): Advice(
        "wrong or hard labels that are being learnt by heart; a learning rate that was cut",
        "uncertainty: if it rises too, the labels; then accuracy on training and on validation data",
    ),
    (SCALE_FREE, False): _RATE,
    (HEAD, True): _GROWN,
    (HEAD, False): _SHRUNK,
    (KERNEL, True): _GROWN,
    (KERNEL, False): _SHRUNK,
    (FEATURES, True): Advice(
        "inputs of another scale, or normalisation with statistics that no longer fit",
        "preprocessing of the validation data, and the running statistics of batch normalisation",
    ),
    (FEATURES, False): _RATE,
    (ALIGNMENT, True): Advice(
        "filters that have come to serve the same classes, or classes that are confused with each other",
        "the confusion matrix, and the margins' lowest quantiles",
    ),
    (ALIGNMENT, False): Advice("filters that specialise, as training goes on", "nothing, unless the margins shrink"),
    (CHURN, True): Advice(
        "a learning rate that is high for this stage, or samples near the decision boundary",
        "learning rate and margins",
    ),
}
_NONFINITE = Advice(
    "an overflow: a learning rate that is too high, half precision, or a logit of minus infinity that masks a class",
    "training loss and gradient norm, the precision of the Trainer, and the last checkpoint with finite values",
)


def context_keys(key: str) -> tuple[str, ...]:
    """Return the keys of the same monitor and loader that explain a change of `key`, and that of the learning rate.

    Example:
        >>> context_keys("margin/mean/train")[:2]
        ('flatness/relative/train', 'flatness/scale_free/train')
    """
    suffix = key_suffix(key)
    return (*(f"{name}{suffix}" for name in (RELATIVE, SCALE_FREE, MARGIN, *FACTORS)), LEARNING_RATE)


def reason(violations: Sequence[Violation]) -> str:
    """Return what moved, since when, and why that makes a rule fire.

    Args:
        violations: the conditions that hold; the first one is explained by the factors and the margin.

    Example:
        >>> from lightning_flatness.rules import Violation
        >>> reason([Violation("flatness/trace", 8.0, 5.0, "above")])
        'flatness/trace is 8, above the limit of 5 from the start.'
    """
    statements = ", and ".join(map(_statement, violations))
    is_key = statements.startswith(violations[0].key)
    return " ".join([f"{statements if is_key else _capital(statements)}.", *explanation(violations)])


def severity(violations: Sequence[Violation]) -> Severity:
    """Return how serious a change is.

    `"critical"`: a value is not finite, or the mean margin is negative, so the average sample is misclassified.
    `"info"`: only the scale of the weights or of the logits has changed. `"warning"`: everything else.

    Args:
        violations: the conditions that hold.

    Example:
        >>> from lightning_flatness.rules import Violation
        >>> severity([Violation("margin/mean", -1.0, 0.5, "below", after={"margin/mean": -1.0})])
        'critical'
    """
    margins = (each.after.get(f"{MARGIN}{key_suffix(each.key)}", 0.0) for each in violations)
    if any(each.condition == "nonfinite" for each in violations) or any(margin < 0 for margin in margins):
        return "critical"
    only_scales = violations and all(_only(each) in ("weights", "logits") for each in violations)
    return "info" if only_scales else "warning"


def advice(rule_name: str, violations: Sequence[Violation]) -> Advice:
    """Return the usual causes of a change, and what to look at next.

    A built-in rule is known by its name. For other rules it depends on what has moved; relative flatness and the trace
    are traced to the factor that moved most.

    Args:
        rule_name: the name of the rule.
        violations: the conditions that hold; the first one counts.

    Returns:
        The advice; empty if nothing is known about the key.

    Example:
        >>> from lightning_flatness.rules import Violation
        >>> advice("mine", [Violation("flatness/relative", math.inf, math.nan, "nonfinite")]).causes[:11]
        'an overflow'
    """
    if any(each.condition == "nonfinite" for each in violations):
        return _NONFINITE
    changes = _own_changes(violations[0]) if violations else {}
    if rule_name == "memorisation":
        return _MEMORISED
    if rule_name in ("label_noise", "divergence", "misclassification"):
        rate_rose = _rate_rose(violations[0]) if violations else None
        if rate_rose is None and rule_name == "label_noise":
            return _LABELS
        is_rate = changes.get(SCALE_FREE, 0.0) <= _SHARPENED if rate_rose is None else rate_rose
        return _THROWN_BACK_BY_RATE if is_rate else _THROWN_BACK_BY_LABELS
    if not violations:
        return Advice()
    first = violations[0]
    suffix = key_suffix(first.key)
    name, up = first.key.removesuffix(suffix), first.condition not in ("below", "shift_down")
    factors = [factor for factor in FACTORS if factor in changes]
    if name in (RELATIVE, TRACE) and factors:
        name = max(factors, key=lambda factor: abs(changes[factor]))
        up = changes[name] > 0
    return _ADVICE.get((name, up), Advice())


def description(alert: Alert) -> str:
    """Return all that an alert has to say, one line for each part.

    Args:
        alert: the alert; lines about which nothing is known are left out.

    Example:
        >>> from lightning_flatness.rules import Alert
        >>> print(description(Alert("mine", "k", 6.0, 5.0, 200, 1, "k is 6, above the limit of 5 from the start.")))
        mine: warning at step 200, epoch 1
        what moved: k is 6, above the limit of 5 from the start.
    """
    parts = [
        (f"{alert.rule_name}", f"{alert.severity} at step {alert.step}, epoch {alert.epoch}"),
        ("what moved", alert.reason),
        ("began", f"after step {alert.onset_step}" if alert.onset_step is not None else ""),
        ("usual causes", alert.causes),
        ("look at", alert.look_at),
        ("done", alert.done),
        *(
            ("same event", f"{each.rule_name} at step {each.step}. {each.reason} {each.done}".strip())
            for each in alert.others
        ),
    ]
    return "\n".join(f"{name}: {text}" for name, text in parts if text)


def explanation(violations: Sequence[Violation]) -> list[str]:
    """Return what else moved: sentences on the factors, the headline values, and on what did not change.

    `flatness/relative` is exactly the product of its five factors, so its change is the product of theirs. Keys that
    are missing, or not positive where a ratio is needed, are left out.

    Args:
        violations: the conditions that hold; the first one is explained.

    Example:
        >>> from lightning_flatness.rules import Violation
        >>> before, after = {"margin/mean": 4.1}, {"margin/mean": 3.2}
        >>> explanation([Violation("flatness/trace", 9.0, 4.0, "rise", before=before, after=after)])
        ['The mean margin fell from 4.1 to 3.2.']
    """
    first, *others = violations
    suffix, changes = key_suffix(first.key), _own_changes(first)
    since = f" since step {first.onset_step}" if others else ""  # each of them has an onset of its own
    sentences = []
    if all(factor in changes for factor in FACTORS):
        ordered = sorted(FACTORS, key=lambda factor: -abs(changes[factor]))
        *most, last = (f"{_title(factor)} {_ratio(math.exp(changes[factor]))}" for factor in ordered)
        product = f"{_ratio(math.exp(sum(changes[factor] for factor in FACTORS)))}{since}"
        product_of = f"the product of {', '.join(most)} and {last}"
        sentences.append(f"Relative flatness changed by a factor of {product}, {product_of}.")
    for name, title in ((CONFIDENCE, "1 - |S|^2"), (SCALE_FREE, "scale-free flatness"), (MARGIN, "the mean margin")):
        key = f"{name}{suffix}"
        if key in [each.key for each in violations] or not (key in first.before and key in first.after):
            continue
        if name != MARGIN and abs(changes.get(name, 0.0)) < _NOTICEABLE:
            continue
        moved = f"{_change(title, first.before[key], first.after[key], digits=2)}{since}."
        sentences.append(_capital(moved if name == MARGIN else f"{_WORDS[name][changes[name] < 0]}: {moved}"))
    before, after = (values.get(LEARNING_RATE, 0.0) for values in (first.before, first.after))
    if LEARNING_RATE in first.before and max(before, after) > min(before, after) * math.exp(_NOTICEABLE):
        sentences.append(f"{_capital(_change('the learning rate', before, after, digits=2))}{since}.")
    if (only := _only(first)) == "confidence":
        less = "less" if changes[first.key.removesuffix(suffix)] > 0 else "more"
        sentences.append(f"The network only became {less} sure: everything else together stayed nearly the same.")
    elif only is not None:
        same = "relative" if only == "weights" else "scale-free"
        sentences.append(f"Only the scale of the {only} changed: {same} flatness stayed nearly the same.")
    return sentences


def _statement(violation: Violation) -> str:
    key, value = violation.key, violation.value
    if violation.condition == "nonfinite":
        return f"{key} is {value}: not finite"
    limit = f"{violation.condition} the limit of {violation.reference:.4g}"
    if violation.onset_step is None:
        return f"{key} is {value:.4g}, {limit} from the start"
    before = violation.before[key]
    if violation.deviation is not None:
        times = f"{_ratio(violation.ratio)} times; " if violation.ratio is not None and violation.ratio > 1 else ""
        why = f"{times}a lasting shift, {violation.deviation:.2g} times the noise"
    elif violation.level is not None:
        level, positive = _LEVELS[violation.level], value > 0 and violation.reference > 0
        why = f"{_ratio(value / violation.reference)} times {level}" if positive else f"compared with {level}"
    else:
        why = limit
    words = _WORDS.get(key.removesuffix(key_suffix(key)))
    meaning = f"{words[value < before]}: " if words and value != before else ""
    return f"{meaning}{_change(key, before, value, digits=4)} since step {violation.onset_step} ({why})"


def _rate_rose(violation: Violation) -> bool | None:
    """Return whether the learning rate is noticeably higher than before the change; None if it is not known."""
    before, after = (values.get(LEARNING_RATE) for values in (violation.before, violation.after))
    if before is None or after is None:
        return None
    return after > before * math.exp(_NOTICEABLE)


def _only(violation: Violation) -> Literal["weights", "logits", "confidence"] | None:
    """Return what alone has changed, if it is a scale or the uncertainty: the classifier itself is then the same."""
    name, changes = violation.key.removesuffix(key_suffix(violation.key)), _own_changes(violation)
    own = changes.get(name, 0.0)

    def stayed(other: str) -> bool:
        return other in changes and abs(changes[other]) <= _NEGLIGIBLE * abs(own)

    if abs(own) < _NOTICEABLE:
        return None
    unmoved = all(stayed(each) for each in (CONFIDENCE, SCALE_FREE) if each in changes)
    if name in _SCALED and stayed(RELATIVE) and unmoved:
        return "weights"
    if name == RELATIVE and stayed(SCALE_FREE):
        return "logits"
    alike = abs(own - changes.get(CONFIDENCE, 0.0)) <= _NEGLIGIBLE * abs(own)
    return "confidence" if name in (RELATIVE, TRACE) and alike else None


def _own_changes(violation: Violation) -> dict[str, float]:
    """Return the changes by key, without the suffix of the monitor and loader."""
    suffix = key_suffix(violation.key)
    return {key.removesuffix(suffix): change for key, change in violation.changes.items() if key.endswith(suffix)}


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _change(what: str, before: float, after: float, digits: int) -> str:
    if before == after:
        return f"{what} stayed at {_number(after, digits)}"
    return f"{what} {'rose' if after > before else 'fell'} from {_number(before, digits)} to {_number(after, digits)}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2g}"


def _title(factor: str) -> str:
    return "uncertainty" if factor == CONFIDENCE else factor.split("/")[1]
