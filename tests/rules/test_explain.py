from __future__ import annotations

import pytest

from lightning_flatness.keys import FACTORS
from lightning_flatness.rules.alert import Violation
from lightning_flatness.rules.explain import explanation, reason

BEFORE = {
    **dict.fromkeys(FACTORS, 2.0),
    "flatness/relative": 32.0,
    "flatness/trace": 8.0,
    "flatness/scale_free": 50.0,
    "margin/mean": 4.1,
}


def changed(**ratios: float) -> dict[str, float]:
    return {key: value * ratios.get(key.split("/")[1], 1.0) for key, value in BEFORE.items()}


def explained(key: str, before: dict[str, float], after: dict[str, float]) -> str:
    return " ".join(explanation([Violation(key, after[key], before[key], "rise", before=before, after=after)]))


@pytest.mark.parametrize(
    ("key", "after", "said"),
    [
        ("flatness/relative", changed(relative=2.28, confidence=1.9, features=1.2, scale_free=2.2), None),
        ("flatness/relative", changed(relative=2, confidence=2, scale_free=2), "only became less sure"),
        ("flatness/trace", changed(relative=2, trace=2, confidence=2, scale_free=2), "only became less sure"),
        ("flatness/relative", changed(relative=3, head=9, confidence=1 / 3), "scale of the logits"),
        ("flatness/trace", changed(trace=4, kernel=0.25, features=4), "scale of the weights"),
        ("flatness/kernel", changed(kernel=4, features=0.25), "scale of the weights"),
        ("flatness/relative", changed(relative=1.05, confidence=1.05), None),  # nothing happened
    ],
)
def test_it_says_if_a_change_is_only_uncertainty_or_scale(key: str, after: dict[str, float], said: str | None) -> None:
    text = explained(key, BEFORE, after)
    assert ("only" in text.lower()) is (said is not None)
    assert (said or "") in text


def test_a_network_that_becomes_more_sure_is_described_as_such() -> None:
    after = changed(relative=0.5, confidence=0.5, scale_free=0.5)
    assert "The network only became more sure" in explained("flatness/relative", BEFORE, after)


def test_it_lists_the_factors_largest_change_first_and_the_margin() -> None:
    after = changed(relative=2.28, confidence=1.9, features=1.2, scale_free=2.2, mean=0.78)
    for key in ("flatness/relative", "flatness/scale_free"):
        assert explained(key, BEFORE, after) == (
            "Relative flatness changed by a factor of 2.3, the product of uncertainty 1.9, features 1.2, head 1.0, "
            "kernel 1.0 and alignment 1.0. The mean margin fell from 4.1 to 3.2."
        )


@pytest.mark.parametrize("suffix", ["/train", "/dataloader_idx_1", "/train/dataloader_idx_1"])
def test_it_compares_the_keys_of_the_same_monitor_and_loader(suffix: str) -> None:
    after = changed(relative=2, confidence=2, scale_free=2)
    before, now = ({f"{key}{suffix}": value for key, value in values.items()} for values in (BEFORE, after))
    expected = explained("flatness/relative", BEFORE, after)
    assert explained(f"flatness/relative{suffix}", {**before, **after}, {**now, **BEFORE}) == expected


def test_what_is_unknown_is_left_out() -> None:
    assert explained("flatness/relative", {"flatness/relative": 1.0}, {"flatness/relative": 2.0}) == ""
    negative = {**BEFORE, "flatness/relative": -1.0, "flatness/alignment": -1.0}  # as a curved activation can make it
    assert explained("flatness/relative", negative, BEFORE) == "The mean margin stayed at 4.1."


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"condition": "rise", "level": "settled"}, "23 times the settled level"),
        ({"condition": "rise", "level": "best"}, "23 times the lowest value so far"),
        ({"condition": "rise", "level": "ema"}, "23 times the moving average"),
        ({"condition": "shift_up", "deviation": 15.23}, "a lasting shift, 15 times the noise"),
        ({"condition": "above", "reference": 9.0}, "above the limit of 9"),
    ],
)
def test_each_condition_has_its_sentence(numbers: dict, why: str) -> None:
    common = {"reference": 2.0, "onset_step": 100, "before": {"k": 2.0}, "after": {"k": 46.0}}
    assert reason([Violation("k", 46.0, **common | numbers)]) == f"k rose from 2 to 46 since step 100 ({why})."


def test_a_value_without_a_ratio_is_compared_in_words() -> None:
    violation = Violation("k", 1.0, -2.0, "rise", "previous", None, 100, {"k": -2.0}, {"k": 1.0})
    assert reason([violation]) == "k rose from -2 to 1 since step 100 (compared with the previous value)."


def test_a_joined_reason_gives_the_onset_of_its_explanation() -> None:
    after = changed(relative=2, features=2, mean=0.5)
    first = Violation("flatness/relative", 64.0, 32.0, "rise", "best", None, 6, BEFORE, after)
    second = Violation("k", 8.0, 5.0, "above", None, None, 30, {"k": 4.0}, {"k": 8.0})
    assert reason([first, second]) == (
        "flatness/relative rose from 32 to 64 since step 6 (2.0 times the lowest value so far), "
        "and k rose from 4 to 8 since step 30 (above the limit of 5). "
        "Relative flatness changed by a factor of 2.0 since step 6, the product of features 2.0, uncertainty 1.0, "
        "head 1.0, kernel 1.0 and alignment 1.0. The mean margin fell from 4.1 to 2 since step 6. "
        "Only the scale of the logits changed: scale-free flatness stayed nearly the same."
    )
    margin = Violation("margin/mean", 2.05, 4.1, "below")
    assert "The mean margin" not in reason([first, margin])  # it has its statement
