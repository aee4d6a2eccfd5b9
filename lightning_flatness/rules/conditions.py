"""The conditions of a rule: each looks at one more validation and says whether it is broken. Standard library only."""

from __future__ import annotations

from lightning_flatness.rules import detectors
from lightning_flatness.rules.detectors import Observation
from lightning_flatness.rules.explain import attribution, moved
from lightning_flatness.rules.watch import Breach, State

REFERENCES = {
    "settled": "the settled level",
    "best": "the lowest so far",
    "ema": "the moving average",
    "previous": "the value before",
}
"""The references of `risen`, and what they are called in a reason."""


def risen(state: State, now: Observation, key: str, rise: float, reference: str) -> Breach | None:
    """Say whether the value is above the reference by more than the fraction `rise` of it."""
    base, breach = state.reference, None
    if base is not None and now[1][key] - base[1][key] > rise * abs(base[1][key]):
        breach = _breach(key, base, now, f"against {REFERENCES[reference]}")
    if reference == "best":
        state.reference = min(base or now, now, key=lambda observation: observation[1][key])
    elif reference == "ema":
        state.reference = detectors.averaged(base, now)
    elif reference == "previous":
        state.reference = now
    elif breach is None:  # a breach does not move the level that it broke
        state.window[:] = [*state.window, now][-detectors.WINDOW :]
        if base is not None or detectors.has_settled(state.window, key):
            state.reference = detectors.typical(state.window, key)
    return breach


def past_limit(state: State, now: Observation, key: str, limit: float, above: bool) -> Breach | None:
    """Say whether the value is past the limit; the reason compares it with the last value that was not."""
    value, side = now[1][key], "above" if above else "below"
    if value <= limit if above else value >= limit:
        state.reference = now
        return None
    if state.reference is None:
        return Breach(key, value, limit, f"{key} is {value:.4g}, {side} {limit:.4g} from the start")
    return _breach(key, state.reference, now, f"{side} {limit:.4g}")._replace(reference=limit)


def shifted(state: State, now: Observation, key: str, threshold: float, up: bool) -> Breach | None:
    """Say whether the cumulative sum of the deviations from what was to be expected has reached the threshold."""
    breach = None
    if len(state.window) >= detectors.WINDOW:
        deviation = detectors.deviation(state.window, now, key, up)
        state.total = detectors.cumulated(state.total, deviation, threshold)
        if state.total >= threshold:
            base = detectors.typical(state.window[-detectors.WINDOW :], key)
            breach = _breach(key, base, now, f"a lasting shift, {deviation:.2g} times the noise")
    state.window[:] = [*state.window, now][-detectors.MEMORY :]
    return breach


def _breach(key: str, base: Observation, now: Observation, why: str) -> Breach:
    value, reference = now[1][key], base[1][key]
    change = f"{moved(reference, value)} since step {base[0]} ({reference:.4g} -> {value:.4g}, {why})"
    return Breach(key, value, reference, f"{key} {change}", attribution(key, base[1], now[1]))
