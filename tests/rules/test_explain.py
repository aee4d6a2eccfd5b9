from __future__ import annotations

import math

import pytest

from lightning_flatness import rules
from lightning_flatness.keys import CONFIDENCE, FACTORS, FEATURES, MARGIN, RELATIVE, SCALE_FREE, TRACE
from lightning_flatness.rules import Alert, Rule, RuleTracker
from lightning_flatness.rules.alert import Violation
from lightning_flatness.rules.explain import advice, explanation, reason, severity

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
            "kernel 1.0 and alignment 1.0. Predictions less sure: 1 - |S|^2 rose from 2 to 3.8. "
            + ("Sharper at any logit scale: scale-free flatness rose from 50 to 110. " if key != SCALE_FREE else "")
            + "The mean margin fell from 4.1 to 3.2."
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
        ({"condition": "shift_up", "deviation": 15.23}, "23 times; a lasting shift, 15 times the noise"),
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
        "Sharper: flatness/relative rose from 32 to 64 since step 6 (2.0 times the lowest value so far), "
        "and k rose from 4 to 8 since step 30 (above the limit of 5). "
        "Relative flatness changed by a factor of 2.0 since step 6, the product of features 2.0, uncertainty 1.0, "
        "head 1.0, kernel 1.0 and alignment 1.0. The mean margin fell from 4.1 to 2 since step 6. "
        "Only the scale of the logits changed: scale-free flatness stayed nearly the same."
    )
    margin = Violation("margin/mean", 2.05, 4.1, "below")
    assert "The mean margin" not in reason([first, margin])  # it has its statement


LEVEL = {**dict.fromkeys(FACTORS, 1.0), CONFIDENCE: 0.05, RELATIVE: 0.05, SCALE_FREE: 300.0, MARGIN: 6.0}
# What the recorded runs of benchmarks/signals.csv.gz do after each disturbance, in round numbers.
NOISY_LABELS = {**LEVEL, CONFIDENCE: 0.45, FEATURES: 0.3, RELATIVE: 0.135, SCALE_FREE: 900.0, MARGIN: 1.3}
HIGH_RATE = {**LEVEL, CONFIDENCE: 0.15, FEATURES: 0.3, RELATIVE: 0.045, SCALE_FREE: 200.0, MARGIN: 3.4}
THROWN_BACK = {**HIGH_RATE, MARGIN: -1.0}
MEMORISED = [
    {**LEVEL, CONFIDENCE: 0.5, "margin/negative": 0.2, SCALE_FREE: level}
    for level in (*[300.0] * 8, 320.0, 400.0, 420.0, 440.0)
]
PRESETS: dict[str, tuple[str, list[dict[str, float]], list[str]]] = {
    "wrong labels": (
        "label_noise",
        [*[LEVEL] * 12, NOISY_LABELS, NOISY_LABELS],
        [
            "label_noise: warning at step 1300, epoch 13",
            "Predictions less sure: flatness/confidence rose from 0.05 to 0.45 since step 1100 (9.0 times; a lasting",
            ", and sharper at any logit scale: flatness/scale_free rose from 300 to 900 since step 1100 (3.0 times; a",
            "The mean margin fell from 6 to 1.3",
            "began: after step 1100",
            "usual causes: labels that turned wrong",
            "look at: training images with their labels",
        ],
    ),
    "too high a rate": (
        "divergence",
        [*[LEVEL] * 12, HIGH_RATE, HIGH_RATE],
        [
            "divergence: warning at step 1300",
            "Smaller features: flatness/features fell from 1 to 0.3 since step 1100 (a lasting shift",
            "Flatter at any logit scale: scale-free flatness fell from 300 to 200.",
            "usual causes: a learning rate that became too high",
            "look at: learning rate, training loss",
        ],
    ),
    "features lost for wrong labels": (
        "divergence",
        [*[LEVEL] * 12, NOISY_LABELS, NOISY_LABELS],
        ["Smaller features: ", "usual causes: labels that turned wrong"],
    ),
    "misclassified": (
        "misclassification",
        [*[{**LEVEL, "margin/negative": 0.01}] * 12, *[{**NOISY_LABELS, "margin/negative": 0.2}] * 2],
        ["More samples misclassified: margin/negative rose from 0.01 to 0.2", "usual causes: labels that turned wrong"],
    ),
    "thrown back": ("divergence", [*[LEVEL] * 12, THROWN_BACK, THROWN_BACK], ["divergence: critical at step 1300"]),
    "learnt by heart": (
        "memorisation",
        MEMORISED,
        [
            "memorisation: warning at step 1100",
            "Sharper at any logit scale: flatness/scale_free rose from 320 to 440 since step 800 (1.5 times the",
            "flatness/confidence is 0.5, above the limit of 0.4 from the start",
            "usual causes: wrong training labels that the network learns by heart",
            "look at: accuracy on training and on validation data, and the most suspicious samples",
        ],
    ),
    "not finite": (
        "label_noise",
        [LEVEL, {**LEVEL, CONFIDENCE: math.nan}],
        ["label_noise: critical at step 100", "flatness/confidence is nan: not finite.", "usual causes: an overflow"],
    ),
}


@pytest.mark.parametrize(("name", "history", "said"), PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("suffix", ["", "/train/dataloader_idx_1"])
def test_a_built_in_rule_explains_its_alert(
    name: str, history: list[dict[str, float]], said: list[str], suffix: str
) -> None:
    tracker = RuleTracker(getattr(rules, name)(suffix=suffix))
    keys = {key: key if key == "learning_rate" else f"{key}{suffix}" for values in history for key in values}
    alerts = [
        tracker.observe({keys[key]: value for key, value in values.items()}, step=100 * epoch, epoch=epoch)
        for epoch, values in enumerate(history)
    ]
    (alert,) = filter(None, alerts)
    text = str(alert).replace(suffix, "") if suffix else str(alert)
    assert [part for part in said if part not in text] == [], text


@pytest.mark.parametrize(
    ("rates", "said", "is_cause"),
    [
        ([0.01] * 12 + [0.1, 0.1], "The learning rate rose from 0.01 to 0.1", True),
        ([0.0] * 12 + [0.1, 0.1], "The learning rate rose from 0 to 0.1", True),
        ([0.01] * 11 + [0.1] * 3, "The learning rate rose from 0.01 to 0.1", True),  # seen a validation later
        ([0.1] * 12 + [0.05, 0.01], "The learning rate fell from 0.1 to 0.01", False),
        ([0.1] * 12 + [0.105, 0.105], "", False),
        ([0.0] * 14, "", False),
        ([None] * 14, "", None),  # then scale-free flatness decides, except for `label_noise`
    ],
)
@pytest.mark.parametrize("name", ["label_noise", "divergence", "misclassification"])
def test_the_learning_rate_is_the_cause_if_it_rose(
    name: str, rates: list[float | None], said: str, is_cause: bool | None
) -> None:
    wrong = [0.01] * 12 + [0.2] * 2
    for after, flatter in ((NOISY_LABELS, False), ({**NOISY_LABELS, SCALE_FREE: 200.0}, True)):
        tracker, history = RuleTracker(getattr(rules, name)()), [*[LEVEL] * 12, after, after]
        alerts = []
        for step, (values, negative, rate) in enumerate(zip(history, wrong, rates, strict=True)):
            known = {} if rate is None else {"learning_rate": rate}
            alerts.append(tracker.observe({**values, "margin/negative": negative, **known}, step))
        if name == "label_noise" and flatter:  # it wants both keys to rise
            assert not any(alerts)
            continue
        (alert,) = filter(None, alerts)
        assert said in str(alert)
        assert ("earning rate" in alert.reason) is bool(said)
        expected = is_cause if is_cause is not None else flatter and name != "label_noise"
        assert alert.causes.startswith("a learning rate" if expected else "labels that turned wrong")


def test_a_rule_may_watch_the_learning_rate() -> None:
    tracker = RuleTracker(Rule("learning_rate", above=0.1))
    assert [bool(tracker.observe(rate, step)) for step, rate in enumerate((0.05, 0.2, 0.05))] == [False, True, False]


@pytest.mark.parametrize(
    ("key", "after", "condition", "causes"),
    [
        (RELATIVE, changed(relative=8, kernel=8), "rise", "weights that grow"),
        (RELATIVE, changed(relative=2, confidence=4, kernel=0.5), "rise", "labels or inputs that changed"),
        (TRACE, changed(trace=0.5, relative=0.3, features=0.3), "below", "a learning rate that became too high"),
        (SCALE_FREE, changed(scale_free=2), "rise", "wrong or hard labels"),
        (SCALE_FREE, changed(scale_free=0.5), "shift_down", "a learning rate that became too high"),
        (MARGIN, changed(mean=0.5), "below", "labels or inputs that changed"),
        (CONFIDENCE, changed(confidence=0.5), "shift_down", "a network that fits"),
        ("val_loss", {"val_loss": 3.0}, "rise", ""),
    ],
)
def test_the_advice_of_any_rule_follows_from_what_moved(
    key: str, after: dict[str, float], condition: str, causes: str
) -> None:
    before = {**BEFORE, "val_loss": 1.0}
    violation = Violation(key, after[key], before[key], condition, None, None, 1, before, after)
    found = advice("mine", [violation])
    assert found.causes.startswith(causes)
    assert bool(found.look_at) is bool(causes)
    assert advice("mine", []) == ("", "")


@pytest.mark.parametrize(
    ("key", "after", "expected"),
    [
        (RELATIVE, changed(relative=3, head=9, confidence=1 / 3), "info"),
        (TRACE, changed(trace=4, kernel=0.25, features=4), "info"),
        (RELATIVE, changed(relative=2, confidence=2, scale_free=2), "warning"),
        (RELATIVE, changed(relative=3, head=9, confidence=1 / 3, mean=-1), "critical"),
        (RELATIVE, changed(relative=math.inf), "critical"),
    ],
)
def test_severity(key: str, after: dict[str, float], expected: str) -> None:
    tracker = RuleTracker(Rule(key, rise=0.5, reference="previous"))
    tracker.observe(BEFORE, step=0)
    assert tracker.observe(after, step=1).severity == expected
    assert severity([]) == "warning"


def test_an_alert_says_what_was_done_and_which_rules_saw_the_same() -> None:
    other = Alert("divergence", "k", 1.0, 2.0, 90, 4, "k fell.", done="Training stops.")
    alert = Alert(rules.label_noise(), "k", 1.0, 2.0, 80, 3, "k rose.", done="Notified: mail.", others=(other,))
    assert alert.rule_names == ("label_noise", "divergence")
    assert str(alert).splitlines()[-2:] == [
        "done: Notified: mail.",
        "same event: divergence at step 90. k fell. Training stops.",
    ]
