from __future__ import annotations

import pytest

from lightning_flatness.rules.explain import FACTORS, attribution

BEFORE = {
    **dict.fromkeys(FACTORS, 2.0),
    "flatness/relative": 32.0,
    "flatness/trace": 8.0,
    "flatness/scale_free": 50.0,
    "margin/mean": 4.1,
}


def changed(**ratios: float) -> dict[str, float]:
    return {key: value * ratios.get(key.split("/")[1], 1.0) for key, value in BEFORE.items()}


@pytest.mark.parametrize(
    ("key", "after", "said"),
    [
        ("flatness/relative", changed(relative=2.28, confidence=1.9, features=1.2, scale_free=2.2), None),
        ("flatness/relative", changed(relative=2, confidence=2, scale_free=2), "only confidence"),
        ("flatness/trace", changed(relative=2, trace=2, confidence=2, scale_free=2), "only confidence"),
        ("flatness/relative", changed(relative=3, head=9, confidence=1 / 3), "scale of the logits"),
        ("flatness/trace", changed(trace=4, kernel=0.25, features=4), "scale of the weights"),
        ("flatness/kernel", changed(kernel=4, features=0.25), "scale of the weights"),
        ("flatness/relative", changed(relative=1.05, confidence=1.05), None),  # nothing happened
    ],
)
def test_it_says_if_a_change_is_only_confidence_or_scale(key: str, after: dict[str, float], said: str | None) -> None:
    text = attribution(key, BEFORE, after)
    assert ("only" in text.lower()) is (said is not None)
    assert (said or "") in text


def test_it_lists_the_factors_largest_change_first_and_the_margin() -> None:
    after = changed(relative=2.28, confidence=1.9, features=1.2, scale_free=2.2, mean=0.78)
    assert attribution("flatness/relative", BEFORE, after) == (
        ": confidence x 1.9, features x 1.2, head x 1.0, kernel x 1.0, alignment x 1.0; margin/mean fell 4.1 -> 3.2."
    )
    assert attribution("flatness/scale_free", BEFORE, after).startswith(": flatness/relative x 2.3 = confidence x 1.9")


@pytest.mark.parametrize("suffix", ["/train", "/dataloader_idx_1", "/train/dataloader_idx_1"])
def test_it_compares_the_keys_of_the_same_monitor_and_loader(suffix: str) -> None:
    after = changed(relative=2, confidence=2, scale_free=2)
    before, now = ({f"{key}{suffix}": value for key, value in values.items()} for values in (BEFORE, after))
    expected = attribution("flatness/relative", BEFORE, after)
    assert attribution(f"flatness/relative{suffix}", {**before, **after}, {**now, **BEFORE}) == expected


def test_what_is_unknown_is_left_out() -> None:
    assert attribution("flatness/relative", {"flatness/relative": 1.0}, {"flatness/relative": 2.0}) == "."
    negative = {**BEFORE, "flatness/relative": -1.0, "flatness/alignment": -1.0}  # as a curved activation can make it
    assert attribution("flatness/relative", negative, BEFORE) == ": margin/mean stood still 4.1 -> 4.1."
