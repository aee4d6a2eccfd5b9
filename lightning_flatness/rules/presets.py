"""The built-in rules. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_flatness.rules.alert import Action
from lightning_flatness.rules.joined import AllOf
from lightning_flatness.rules.rule import Rule


def label_noise(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for labels that have become wrong in the middle of a training.

    The predictions become unsure, and the same confidence now takes a sharper minimum: `flatness/confidence` and
    `flatness/scale_free` shift up together. After a learning rate that is too large scale-free flatness falls.

    Args:
        action: what to do; None: nothing but to record the alert.
        suffix: of the keys, as in `"/train"` for a monitor with `name="train"`.
    """
    return AllOf(
        [Rule(f"flatness/confidence{suffix}", shift_up=8.0), Rule(f"flatness/scale_free{suffix}", shift_up=8.0)],
        action=action,
    )


def divergence(action: Action | Sequence[Action] | None = None, suffix: str = "") -> Rule:
    """Return the rule for a training that has been thrown out of what it had learned, as by a learning rate too large.

    The features shrink within an epoch or two and stay small, whatever the margins do later: `flatness/features` shifts
    down. Labels that have become wrong do the same; then `label_noise` fires beside it.

    Args:
        action: what to do; None: nothing but to record the alert.
        suffix: of the keys.
    """
    return Rule(f"flatness/features{suffix}", shift_down=10.0, action=action)


def memorisation(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for a network that learns its training labels by heart.

    `flatness/scale_free` goes on rising, by 30 % and more above where it had settled, and the predictions are still
    unsure: `flatness/confidence` is above 0.4, in three validations in a row. In a healthy training they are sure by
    then.

    Args:
        action: what to do; None: nothing but to record the alert.
        suffix: of the keys.
    """
    return AllOf(
        [Rule(f"flatness/scale_free{suffix}", rise=0.3), Rule(f"flatness/confidence{suffix}", above=0.4)],
        patience=3,
        cooldown=10,
        action=action,
    )


def default(action: Action | Sequence[Action] | None = None, suffix: str = "") -> tuple[Rule | AllOf, ...]:
    """Return all ready-made rules, new objects in each call.

    Args:
        action: what each of them does; None: nothing but to record the alert.
        suffix: of the keys.

    Example:
        >>> [rule.keys[0] for rule in default(suffix="/train")]
        ['flatness/confidence/train', 'flatness/features/train', 'flatness/scale_free/train']
    """
    return label_noise(action, suffix), divergence(action, suffix), memorisation(action, suffix)
