"""The built-in rules. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_flatness.keys import CONFIDENCE, FEATURES, NEGATIVE, SCALE_FREE
from lightning_flatness.rules.alert import Action
from lightning_flatness.rules.rule import AllOf, Rule


def label_noise(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for labels that turn wrong in the middle of training.

    The network becomes less sure, and its minimum becomes sharper at equal scale of the logits: `flatness/confidence`
    and `flatness/scale_free` shift up together. When the learning rate is too high, scale-free flatness falls instead.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end: `"/train"` for a monitor with `name="train"`.
    """
    return AllOf(
        [Rule(f"{CONFIDENCE}{suffix}", shift_up=8.0), Rule(f"{SCALE_FREE}{suffix}", shift_up=8.0)],
        action=action,
        name="label_noise",
    )


def divergence(action: Action | Sequence[Action] | None = None, suffix: str = "") -> Rule:
    """Return the rule for a training that loses what it had learned, for instance when the learning rate is too high.

    The features shrink within one or two epochs and stay small, even after the margins have recovered:
    `flatness/features` shifts down. Labels that turn wrong can have the same effect, and `label_noise` does not always
    fire then: the alert names both causes.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end.
    """
    return Rule(f"{FEATURES}{suffix}", shift_down=10.0, action=action, name="divergence")


def memorisation(action: Action | Sequence[Action] | None = None, suffix: str = "") -> AllOf:
    """Return the rule for a network that memorises wrong training labels.

    `flatness/scale_free` is at least 30 % above its settled level while the network is right about most samples
    (`margin/negative` below 0.5) and still unsure (`flatness/confidence` above 0.4), in three consecutive validations.
    A healthy training has become sure by then. One that has not learnt anything yet is unsure too, but mostly wrong.

    Args:
        action: what to do; None: only record the alert.
        suffix: how the keys end.
    """
    return AllOf(
        [
            Rule(f"{SCALE_FREE}{suffix}", rise=0.3),
            Rule(f"{CONFIDENCE}{suffix}", above=0.4),
            Rule(f"{NEGATIVE}{suffix}", below=0.5),
        ],
        patience=3,
        cooldown=10,
        action=action,
        name="memorisation",
    )


def default(action: Action | Sequence[Action] | None = None, suffix: str = "") -> tuple[Rule | AllOf, ...]:
    """Return all built-in rules.

    Args:
        action: what each of them does; None: only record the alert.
        suffix: how the keys end.

    Example:
        >>> [str(rule) for rule in default()]
        ['label_noise', 'divergence', 'memorisation']
    """
    return label_noise(action, suffix), divergence(action, suffix), memorisation(action, suffix)
