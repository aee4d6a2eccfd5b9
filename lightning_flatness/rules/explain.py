"""Turns the numbers of an alert into its English sentence; the only place that does. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_flatness.keys import (
    CONFIDENCE,
    FACTORS,
    FEATURES,
    HEAD,
    KERNEL,
    MARGIN,
    RELATIVE,
    SCALE_FREE,
    TRACE,
    key_suffix,
)
from lightning_flatness.rules.alert import Violation

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


def context_keys(key: str) -> tuple[str, ...]:
    """Return the keys of the same monitor and loader that explain a change of `key`.

    Example:
        >>> context_keys("margin/mean/train")[:2]
        ('flatness/relative/train', 'flatness/scale_free/train')
    """
    suffix = key_suffix(key)
    return tuple(f"{name}{suffix}" for name in (RELATIVE, SCALE_FREE, MARGIN, *FACTORS))


def reason(violations: Sequence[Violation]) -> str:
    """Return why a rule fires, in English.

    Args:
        violations: the conditions that hold; the first one is explained by the factors and the margin.

    Example:
        >>> reason([Violation("flatness/trace", 8.0, 5.0, "above")])
        'flatness/trace is 8, above the limit of 5 from the start.'
    """
    statements = ", and ".join(map(_statement, violations))
    return " ".join([f"{statements}.", *explanation(violations)])


def explanation(violations: Sequence[Violation]) -> list[str]:
    """Return what the first change is made of: sentences on the factors, on the margin and on what did not change.

    `flatness/relative` is exactly the product of its five factors, so its change is the product of theirs. Keys that
    are missing, or not positive where a ratio is needed, are left out.

    Example:
        >>> before, after = {"margin/mean": 4.1}, {"margin/mean": 3.2}
        >>> explanation([Violation("flatness/trace", 9.0, 4.0, "rise", before=before, after=after)])
        ['The mean margin fell from 4.1 to 3.2.']
    """
    first, *others = violations
    suffix = key_suffix(first.key)
    changes = {key.removesuffix(suffix): change for key, change in first.changes.items() if key.endswith(suffix)}
    since = f" since step {first.onset_step}" if others else ""  # each of them has an onset of its own
    sentences = []
    if all(factor in changes for factor in FACTORS):
        ordered = sorted(FACTORS, key=lambda factor: -abs(changes[factor]))
        *most, last = (f"{_title(factor)} {_ratio(math.exp(changes[factor]))}" for factor in ordered)
        product = f"{_ratio(math.exp(sum(changes[factor] for factor in FACTORS)))}{since}"
        product_of = f"the product of {', '.join(most)} and {last}"
        sentences.append(f"Relative flatness changed by a factor of {product}, {product_of}.")
    margin = f"{MARGIN}{suffix}"
    if margin not in [each.key for each in violations] and margin in first.before and margin in first.after:
        sentences.append(f"{_change('The mean margin', first.before[margin], first.after[margin], digits=2)}{since}.")
    return sentences + _unchanged(first.key.removesuffix(suffix), changes)


def _statement(violation: Violation) -> str:
    key, value = violation.key, violation.value
    if violation.condition == "nonfinite":
        return f"{key} is {value}: not finite"
    limit = f"{violation.condition} the limit of {violation.reference:.4g}"
    if violation.onset_step is None:
        return f"{key} is {value:.4g}, {limit} from the start"
    if violation.deviation is not None:
        why = f"a lasting shift, {violation.deviation:.2g} times the noise"
    elif violation.level is not None:
        level = _LEVELS[violation.level]
        why = f"compared with {level}" if violation.ratio is None else f"{_ratio(violation.ratio)} times {level}"
    else:
        why = limit
    return f"{_change(key, violation.before[key], value, digits=4)} since step {violation.onset_step} ({why})"


def _unchanged(name: str, changes: Mapping[str, float]) -> list[str]:
    """Say so if nothing but a scale or the uncertainty changed: the classifier itself is then still the same."""
    own = changes.get(name, 0.0)

    def stayed(other: str) -> bool:
        return other in changes and abs(changes[other]) <= _NEGLIGIBLE * abs(own)

    if abs(own) < _NOTICEABLE:
        return []
    if name in _SCALED and stayed(RELATIVE):
        return ["Only the scale of the weights changed: relative flatness stayed nearly the same."]
    if name == RELATIVE and stayed(SCALE_FREE):
        return ["Only the scale of the logits changed: scale-free flatness stayed nearly the same."]
    if name in (RELATIVE, TRACE) and abs(own - changes.get(CONFIDENCE, 0.0)) <= _NEGLIGIBLE * abs(own):
        less = "less" if own > 0 else "more"
        return [f"The network only became {less} sure: everything else together stayed nearly the same."]
    return []


def _change(what: str, before: float, after: float, digits: int) -> str:
    if before == after:
        return f"{what} stayed at {after:.{digits}g}"
    return f"{what} {'rose' if after > before else 'fell'} from {before:.{digits}g} to {after:.{digits}g}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2g}"


def _title(factor: str) -> str:
    return "uncertainty" if factor == CONFIDENCE else factor.split("/")[1]
