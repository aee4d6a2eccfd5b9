"""The sentence of an alert: what changed, and what the change is made of. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping

_CONFIDENCE = "flatness/confidence"
FACTORS = (_CONFIDENCE, "flatness/head", "flatness/kernel", "flatness/features", "flatness/alignment")
"""The keys whose product is `flatness/relative`."""
_RELATIVE, _SCALE_FREE, _MARGIN = "flatness/relative", "flatness/scale_free", "margin/mean"
_SCALED = ("flatness/trace", "flatness/head", "flatness/kernel", "flatness/features")  # move with the weights' scale
_STILL = 0.1  # of the change to explain: what moved less than this stood still
_NOTICEABLE = math.log(1.1)


def context_keys(key: str) -> tuple[str, ...]:
    """Return the keys that explain a change of `key`: those of the same loader and monitor.

    Example:
        >>> context_keys("margin/mean/train")[:2]
        ('flatness/relative/train', 'flatness/scale_free/train')
    """
    suffix = _suffix(key)
    return tuple(f"{name}{suffix}" for name in (_RELATIVE, _SCALE_FREE, _MARGIN, *FACTORS))


def moved(before: float, after: float) -> str:
    """Say how a value moved: by its ratio where it has one.

    Example:
        >>> moved(2.0, 3.0), moved(4.0, -1.0)
        ('rose x 1.5', 'fell')
    """
    verb = "rose" if after > before else "fell" if after < before else "stood still"
    return f"{verb} {_times(after / before)}" if before > 0 and after > 0 else verb


def attribution(key: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Say what a change of `key` is made of: the five factors of relative flatness, the margin, and what it only is.

    `flatness/relative` is exactly the product of the factors, so its change is the product of theirs. Keys that
    are missing, or not positive where a ratio is needed, are left out.

    Args:
        key: the monitored key; its suffix selects the others.
        before: values by key at the reference.
        after: values by key now.

    Returns:
        What completes the sentence "... rose x 2.3 since step 400", up to its full stop.

    Example:
        >>> attribution("flatness/trace", {"margin/mean": 4.1}, {"margin/mean": 3.2})
        ': margin/mean fell 4.1 -> 3.2.'
    """
    suffix = _suffix(key)
    name = key.removesuffix(suffix)
    change = _log_ratios(before, after, suffix)
    parts = []
    if all(factor in change for factor in FACTORS):
        product = math.exp(sum(change[factor] for factor in FACTORS))
        whole = "" if name == _RELATIVE else f"{_RELATIVE} {_times(product)} = "
        ordered = sorted(FACTORS, key=lambda factor: -abs(change[factor]))
        parts.append(whole + ", ".join(f"{each.split('/')[1]} {_times(math.exp(change[each]))}" for each in ordered))
    margin = f"{_MARGIN}{suffix}"
    if margin != key and margin in before and margin in after:
        verb = moved(before[margin], after[margin]).split(" x ")[0]
        parts.append(f"{_MARGIN} {verb} {before[margin]:.2g} -> {after[margin]:.2g}")
    return (": " + "; ".join(parts) if parts else "") + "." + _only(name, change)


def _only(name: str, change: Mapping[str, float]) -> str:
    """Say so if the change is nothing but scale or confidence: the classifier itself did not change."""
    own = change.get(name, 0.0)

    def still(other: str) -> bool:
        return other in change and abs(change[other]) <= _STILL * abs(own)

    if abs(own) < _NOTICEABLE:
        return ""
    if name in _SCALED and still(_RELATIVE):
        return " Only the scale of the weights changed: flatness/relative stood still."
    if name == _RELATIVE and still(_SCALE_FREE):
        return " Only the scale of the logits changed: flatness/scale_free stood still."
    if name in (_RELATIVE, "flatness/trace") and abs(own - change.get(_CONFIDENCE, 0.0)) <= _STILL * abs(own):
        return " It is only confidence: everything else together stood still."
    return ""


def _log_ratios(before: Mapping[str, float], after: Mapping[str, float], suffix: str) -> dict[str, float]:
    shared = (key for key in before if key.endswith(suffix) and key in after)
    return {
        key.removesuffix(suffix): math.log(after[key] / before[key])
        for key in shared
        if before[key] > 0 and after[key] > 0
    }


def _times(ratio: float) -> str:
    return f"x {ratio:.1f}" if 0.995 <= ratio < 9.95 else f"x {ratio:.2g}"


def _suffix(key: str) -> str:
    """Return what follows the quantity in a key: the monitor's name and Lightning's loader index."""
    return "".join(f"/{part}" for part in key.split("/")[2:])
