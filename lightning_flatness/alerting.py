"""Rules at work in a training: evaluates them in every validation, and carries out what their alerts call for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.actions import escalation
from lightning_flatness.keys import CHURN
from lightning_flatness.reporting.console import say
from lightning_flatness.reporting.loggers import Loggers, log_step
from lightning_flatness.rules import Action, Alert, AllOf, AnyOf, Rule, RuleTracker, Violation, default
from lightning_flatness.rules.alert import ActionError
from lightning_flatness.rules.rule import AnyRule

_LOADER = re.compile(r"/dataloader_idx_\d+$")


class RuleRunner:
    """The rules of one monitor, their alerts and their actions.

    Args:
        rules: the rules; `"default"`: the built-in ones, which report and never act.
        suffix: how the monitor's keys end.
        loggers: where alerts are shown; None: new ones.

    Attributes:
        alerts: all alerts so far, oldest first.

    Raises:
        ValueError: if something is not a rule, or an action is not an action.
    """

    def __init__(
        self,
        rules: Rule | AllOf | AnyOf | Sequence[Rule | AllOf | AnyOf] | Literal["default"],
        suffix: str,
        loggers: Loggers | None = None,
    ) -> None:
        given = default(suffix=suffix) if rules == "default" else [rules] if isinstance(rules, AnyRule) else rules
        if not all(isinstance(rule, AnyRule) for rule in given):
            raise ValueError(f'`rules` must be "default" or a list of Rule, AllOf and AnyOf; got {rules!r}.')
        self.rules = tuple(given)
        self.alerts: list[Alert] = []
        self._trackers = [RuleTracker(rule) for rule in self.rules]
        self._loggers = loggers or Loggers(suffix)
        self._absent: frozenset[str] = frozenset()  # keys that the method does not give
        self._is_resuming = False  # a checkpoint has been loaded, and what its alerts had begun is not yet taken up
        for rule in self.rules:
            for action in rule.action if isinstance(rule.action, (list, tuple)) else [rule.action]:
                if not (action is None or isinstance(action, Action)):
                    raise ValueError(
                        f"An action must be a StopTraining, ReduceLR, Notify or other Action; got {action!r}."
                    )

    def require_keys(self, keys: Sequence[str]) -> None:
        """Refuse a rule that watches a key which is never logged.

        Raises:
            ValueError: if there is one; it lists the keys that are logged.
        """
        for rule in self.rules:
            if unknown := [key for key in rule.keys if _LOADER.sub("", key) not in keys]:
                raise _unknown(unknown[0], keys)

    def set_aside(self, keys: Sequence[str], method: str) -> list[str]:
        """Expect these keys no more, since the method does not give them; return a sentence for each rule that does."""
        self._absent = frozenset(keys)
        return [
            f"cannot evaluate the rule `{rule.name}`, which watches `{key}`: the method `{method}` does not give this "
            "key. The rule is inactive; watch another key."
            for rule in self.rules
            for key in rule.keys
            if _LOADER.sub("", key) in self._absent
        ]

    def observe(self, values: Mapping[str, float], trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate all rules on the values of one validation, and act on their alerts.

        Every process must call this. With several validation loaders, a key without a loader's suffix means the first
        loader. The step of an alert is the one at which the loggers have the values.

        Raises:
            ActionError: if an action failed; its alert is recorded and shown.
            Exception: whatever else failed first, after all rules have seen the values.
        """
        if not self.rules:
            return
        self.resume(trainer)
        first = {_LOADER.sub("", key): value for key, value in list(values.items())[::-1]}
        # All processes decide on the values of the first one: theirs may differ by rounding.
        fresh = trainer.strategy.broadcast({**first, **values})
        errors: list[Exception] = [
            _unknown(key, list(fresh))
            for rule in self.rules
            for key in rule.keys
            if key not in fresh and not key.startswith(CHURN)  # which the first validation lacks
            if _LOADER.sub("", key) not in self._absent
        ]
        for tracker in self._trackers:
            try:
                alert = tracker.observe(fresh, step=log_step(trainer), epoch=trainer.current_epoch)
            except Exception as error:  # the other rules must see the values all the same
                errors.append(error)
                continue
            if alert is not None:
                errors += self._handle(alert, trainer, pl_module)
        if errors:
            raise errors[0]

    def resume(self, trainer: Trainer) -> None:
        """Take up what the alerts of a checkpoint had begun: stops that wait, cuts that are watched.

        Call it when the training goes on; the first `observe` does it otherwise.
        """
        if self._is_resuming:
            self._is_resuming = False
            for alert in self.alerts:
                if (action := escalation(alert.rule.action, alert.number)) is not None:
                    action.resume(alert, trainer)

    def _handle(self, alert: Alert, trainer: Trainer, pl_module: LightningModule) -> list[Exception]:
        """Record an alert, show it, and then act on it; return what failed."""
        self.alerts.append(alert)
        action = escalation(alert.rule.action, alert.number)
        errors: list[Exception] = []
        say(f"Flatness alert: {alert.reason}")
        try:
            self._loggers.show(trainer, alert, "" if action is None else f"Action: {action!r}.")
        except Exception as error:  # the action must come all the same
            errors.append(error)
        try:
            if action is not None:
                say(f"Flatness action: {action.apply(alert, trainer, pl_module)}")
        except ActionError as error:
            errors.append(error)
        except Exception as error:
            failed = ActionError(f"{action!r} failed after an alert, which is recorded: {error!r}")
            failed.__cause__ = error
            errors.append(failed)
        return errors

    def state_dict(self) -> dict[str, Any]:
        """Return the alerts and what the rules remember, in plain Python types."""
        return {
            "rules": [tracker.state_dict() for tracker in self._trackers],
            "alerts": [
                {field.name: getattr(alert, field.name) for field in fields(alert)}
                | {
                    "rule": [rule is alert.rule for rule in self.rules].index(True),
                    "violations": [asdict(violation) for violation in alert.violations],
                }
                for alert in self.alerts
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. If it has another number of rules, all rules start over."""
        if len(state["rules"]) != len(self.rules):
            rank_zero_warn(
                f"The checkpoint remembers {len(state['rules'])} rules and the monitor has {len(self.rules)}: "
                "they start over. Resume with the same rules to continue.",
                category=UserWarning,
            )
            return
        for tracker, remembered in zip(self._trackers, state["rules"], strict=True):
            tracker.load_state_dict(remembered)
        self._is_resuming = True
        self.alerts.clear()  # in place: the monitor shares the list
        numbers: Counter[int] = Counter()
        for saved in state["alerts"]:
            numbers[saved["rule"]] += 1
            # Checkpoints from before this had neither numbers nor violations.
            violations = tuple(Violation(**each) for each in saved.get("violations", ()))
            known = {"number": numbers[saved["rule"]], **saved}
            self.alerts.append(Alert(**known | {"rule": self.rules[saved["rule"]], "violations": violations}))


def _unknown(key: str, logged: Sequence[str]) -> ValueError:
    return ValueError(f"A rule must watch a key that is logged; got `{key}`. Logged: {sorted(logged)}.")
