"""Rules at work: shows them every validation's values, and carries out what the alerts call for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_flatness import rules as ready_made
from lightning_flatness.actions import escalation
from lightning_flatness.reporting.loggers import Sinks
from lightning_flatness.rules import AllOf, AnyOf, Rule
from lightning_flatness.rules.alert import Action, Alert

_LOADER = re.compile(r"/dataloader_idx_\d+$")


class Alarm:
    """The rules of one monitor, their alerts and their actions.

    Args:
        rules: the rules, copied without what they remember; `"default"`: the ready-made set, which only notifies.
        suffix: how the monitor's keys end.

    Raises:
        ValueError: if something is not a rule, or an action is not an action.
    """

    def __init__(
        self, rules: Rule | AllOf | AnyOf | Sequence[Rule | AllOf | AnyOf] | Literal["default"], suffix: str
    ) -> None:
        given = ready_made.default(suffix=suffix) if rules == "default" else rules
        given = [given] if isinstance(given, (Rule, AllOf, AnyOf)) else given
        if not all(isinstance(rule, (Rule, AllOf, AnyOf)) for rule in given):
            raise ValueError(f'`rules` must be "default" or a list of Rule, AllOf and AnyOf; got {rules!r}.')
        self.rules = tuple(replace(rule) for rule in given)
        self.alerts: list[Alert] = []
        self._sinks = Sinks()
        for rule in self.rules:
            actions = rule.action if isinstance(rule.action, (list, tuple)) else [rule.action]
            if wrong := [action for action in actions if not (action is None or isinstance(action, Action))]:
                raise ValueError(
                    f"An action must be a StopTraining, ReduceLR, Notify or other Action; got {wrong[0]!r}."
                )

    def require_keys(self, keys: Sequence[str]) -> None:
        """Refuse a rule that watches what is never logged.

        Raises:
            ValueError: if there is one; lists the keys that are logged.
        """
        for rule in self.rules:
            if unknown := [key for key in rule.keys if _LOADER.sub("", key) not in keys]:
                raise ValueError(f"A rule must watch a key that is logged; got `{unknown[0]}`. Logged: {sorted(keys)}.")

    def observe(self, values: Mapping[str, float], trainer: Trainer, pl_module: LightningModule) -> None:
        """Show all rules the fresh values of one validation, and act on their alerts; every process has to call it.

        With several validation loaders, a key without a loader's suffix is that of the first one.
        """
        if not self.rules:
            return
        first = {_LOADER.sub("", key): value for key, value in list(values.items())[::-1]}
        # Whatever rounding or order the processes had, they decide alike.
        fresh = trainer.strategy.broadcast({**first, **values})
        errors: list[Exception] = [
            ValueError(f"A rule must watch a key that is logged; got `{key}`. Logged: {sorted(fresh)}.")
            for rule in self.rules
            for key in rule.keys
            if key not in fresh
        ]
        for rule in self.rules:
            try:
                alert = rule.observe(fresh, step=trainer.global_step, epoch=trainer.current_epoch)
                if alert is not None:
                    self._sound(alert, trainer, pl_module)
            except Exception as error:  # the other rules must see the values all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def _sound(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> None:
        self.alerts.append(alert)
        action = escalation(alert.rule.action, alert.rule.fired)
        done = "" if action is None else action.apply(alert, trainer, pl_module)
        rank_zero_info(f"Flatness alert: {alert.reason} {done}".rstrip())
        self._sinks.alert(trainer, alert, done)

    def state_dict(self) -> dict[str, Any]:
        """Return alerts and what the rules remember, in plain Python types."""
        plain = [field.name for field in fields(Alert) if field.name != "rule"]
        return {
            "rules": [rule.state_dict() for rule in self.rules],
            "alerts": [
                {
                    "rule": [rule is alert.rule for rule in self.rules].index(True),
                    **{name: getattr(alert, name) for name in plain},
                }
                for alert in self.alerts
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; with another number of rules they start anew."""
        if len(state["rules"]) != len(self.rules):
            rank_zero_warn(
                f"The checkpoint remembers {len(state['rules'])} rules and the monitor has {len(self.rules)}: "
                "they start anew. Resume with the same rules to go on.",
                category=UserWarning,
            )
            return
        for rule, remembered in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(remembered)
        self.alerts[:] = [Alert(**{**alert, "rule": self.rules[alert["rule"]]}) for alert in state["alerts"]]
