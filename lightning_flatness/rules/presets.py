"""The built-in rules. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_flatness.keys import CONFIDENCE, FEATURES, MARGIN, NEGATIVE, SCALE_FREE
from lightning_flatness.rules.alert import Action
from lightning_flatness.rules.rule import AllOf, Rule


def label_noise(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for labels that turn wrong in the middle of training.

    The network becomes less sure, and its minimum becomes sharper at equal scale of the logits: `flatness/confidence`
    and `flatness/scale_free` shift up together. When the learning rate is too high, scale-free flatness often falls.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end: `"/train"` for a monitor with `name="train"`.
    """
    return AllOf(
        [Rule(f"{CONFIDENCE}{suffix}", shift_up=4.0), Rule(f"{SCALE_FREE}{suffix}", shift_up=4.0)],
        action=action,
        name="label_noise",
    )


def divergence(action: Action | Sequence[Action] | None = None, suffix: str = "") -> Rule:
    """Return the rule for a training that loses what it had learned, for instance when the learning rate is too high.

    The features shrink within one or two epochs and stay small, even after the margins have recovered:
    `flatness/features` shifts down. Labels that turn wrong can have the same effect, and `label_noise` does not always
    fire then: the alert names both causes, first the learning rate if it has risen.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end.
    """
    return Rule(f"{FEATURES}{suffix}", shift_down=10.0, action=action, name="divergence")


def misclassification(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for a training that gets wrong what it had got right.

    `margin/negative` shifts up and `margin/mean` down. On training images, in a monitor with `data="train"`, this is
    the first that is seen of labels that turned wrong, since they contradict the network at once. A warm restart of the
    learning rate, which throws a training back for a while, has the same effect.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end.
    """
    return AllOf(
        [Rule(f"{NEGATIVE}{suffix}", shift_up=6.0), Rule(f"{MARGIN}{suffix}", shift_down=6.0)],
        action=action,
        name="misclassification",
    )


def memorisation(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for a network that memorises wrong training labels.

    `flatness/scale_free` is at least 30 % above its settled level while the network is right about three quarters of
    the samples (`margin/negative` below 0.25) and still unsure (`flatness/confidence` above 0.4), in three consecutive
    validations. A healthy training has become sure by then. One that has not learnt much yet is unsure too, but wrong.
    It is not one of `default`: healthy trainings that stay unsure look the same on some data.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end.
    """
    return AllOf(
        [
            Rule(f"{SCALE_FREE}{suffix}", rise=0.3),
            Rule(f"{CONFIDENCE}{suffix}", above=0.4),
            Rule(f"{NEGATIVE}{suffix}", below=0.25),
        ],
        patience=3,
        cooldown=10,
        action=action,
        name="memorisation",
    )


def default(action: Action | Sequence[Action] | None = None, suffix: str = "") -> tuple[Rule | AllOf, ...]:
    """Return the built-in rules that rarely fire in a healthy training: all but `memorisation`.

    Args:
        action: what each of them does; None: only record the alert.
        suffix: how the keys end.

    Example:
        >>> [str(rule) for rule in default()]
        ['label_noise', 'divergence', 'misclassification']
    """
    return label_noise(action, suffix), divergence(action, suffix), misclassification(action, suffix)
