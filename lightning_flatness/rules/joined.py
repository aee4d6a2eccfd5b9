"""Rules that join several conditions. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_flatness.rules.alert import Action
from lightning_flatness.rules.rule import Rule
from lightning_flatness.rules.watch import Breach, State, Watch


@dataclass(frozen=True)
class _Joined(Watch):
    """Several conditions and one action.

    The patience and the warm-up of each condition are its own; those given here count validations in which the
    joined condition holds.
    """

    rules: Sequence[Rule]
    patience: int = 1
    warmup: int = 0
    cooldown: int = 0
    action: Action | Sequence[Action] | None = None
    _state: State = field(default_factory=State, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what was given; the conditions are copied, so that no two joined rules share one."""
        if len(self.rules) < 2:
            raise ValueError(f"`rules` must hold at least two rules to join; got {len(self.rules)}.")
        for rule in self.rules:
            if rule.action is not None or rule.cooldown:
                raise ValueError(
                    f"A joined rule must have neither `action` nor `cooldown`; the one on {rule.monitor} has. "
                    f"Give them to {type(self).__name__}."
                )
        object.__setattr__(self, "rules", tuple(replace(rule) for rule in self.rules))
        self.check()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the conditions read."""
        return tuple(dict.fromkeys(rule.monitor for rule in self.rules))

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule and its conditions remember, in plain Python types."""
        return {**super().state_dict(), "rules": [rule.state_dict() for rule in self.rules]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state)
        for rule, own in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(own)

    def sees(self, values: Mapping[str, float]) -> bool:
        """Return whether there is anything to judge for one of the conditions."""
        return any(rule.sees(values) for rule in self.rules)

    def restart(self) -> None:
        """Start over after an alert, with every condition."""
        super().restart()
        for rule in self.rules:
            rule.restart()

    def _judge(self, values: Mapping[str, float], step: int, warming_up: bool) -> Breach | None:
        breaches = [breach for rule in self.rules if (breach := rule.holding(values, step))]
        urgent = any(breach.urgent for breach in breaches)
        if not urgent and (warming_up or len(breaches) < self._needed()):
            return None
        changes = "; and ".join(breach.change for breach in breaches)
        return breaches[0]._replace(change=changes, urgent=urgent)

    def _needed(self) -> int:
        raise NotImplementedError


class AllOf(_Joined):
    """Fires when all of several conditions hold in the same validation.

    Args:
        rules: the conditions, rules without `action` and `cooldown`.
        patience: validations in a row in which all must hold.
        warmup: validations at the start in which it does not fire.
        cooldown: validations after an alert in which it does not fire.
        action: as that of a `Rule`.

    Raises:
        ValueError: if fewer than two rules are given, or one has an action or a cooldown of its own.

    Example:
        >>> rule = AllOf([Rule("flatness/relative", above=100.0), Rule("margin/mean", below=1.0)])
        >>> rule.observe({"flatness/relative": 120.0, "margin/mean": 2.0}, step=10)
        >>> rule.observe({"flatness/relative": 130.0, "margin/mean": 0.5}, step=20).value
        130.0
    """

    def _needed(self) -> int:
        return len(self.rules)


class AnyOf(_Joined):
    """Fires when at least one of several conditions holds.

    The arguments are those of `AllOf`.

    Example:
        >>> rule = AnyOf([Rule("flatness/relative", above=100.0), Rule("margin/mean", below=1.0)])
        >>> rule.observe({"flatness/relative": 90.0, "margin/mean": 0.5}, step=20).key
        'margin/mean'
    """

    def _needed(self) -> int:
        return 1
