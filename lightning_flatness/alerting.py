"""Rules at work in a training: evaluates them in every validation, and carries out what their alerts call for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_flatness.actions import escalation
from lightning_flatness.actions.learning_rate import learning_rates
from lightning_flatness.keys import CHURN, LABELLED, LEARNING_RATE, OF_LAYER, keys_of, keys_of_layers
from lightning_flatness.reporting.console import say
from lightning_flatness.reporting.loggers import Loggers, log_step
from lightning_flatness.rules import Action, Alert, AllOf, AnyOf, Rule, RuleTracker, Violation, default
from lightning_flatness.rules.alert import ActionError
from lightning_flatness.rules.rule import AnyRule, JoinedRule

_LOADER = re.compile(r"/dataloader_idx_\d+$")


class RuleRunner:
    """The rules of one monitor, their alerts and their actions.

    Rules that fire in the same validation, or in the next one, report one event: the alert of the first has those of
    the others, each with its own number. What the rules remember and what they do does not depend on that.

    Args:
        rules: the rules; `"default"`: `rules.default()`, which report and never act.
        suffix: how the monitor's keys end.
        loggers: where alerts are shown; None: new ones.

    Attributes:
        alerts: all alerts so far, one for each event, oldest first.

    Raises:
        ValueError: if something is not a rule, or an action is not an action.
    """

    def __init__(
        self,
        rules: Rule | AllOf | AnyOf | Sequence[Rule | AllOf | AnyOf] | Literal["default"],
        suffix: str,
        loggers: Loggers | None = None,
    ) -> None:
        _require_called(rules)
        given = default(suffix=suffix) if rules == "default" else [rules] if isinstance(rules, AnyRule) else rules
        if not all(isinstance(rule, AnyRule) for rule in given):
            raise ValueError(f'`rules` must be "default" or a list of Rule, AllOf and AnyOf; got {rules!r}.')
        self.rules = tuple(given)
        self.alerts: list[Alert] = []
        self._trackers = [RuleTracker(rule) for rule in self.rules]
        self._loggers = loggers or Loggers(suffix)
        self._suffix = suffix
        # Keys that may be logged, with both labels: of the one layer, or of several.
        self._labelled = [f"{key}{suffix}" for pair in LABELLED.items() for key in pair]
        self._absent: frozenset[str] = frozenset()  # keys that the method does not give
        self._recent = 0  # from this alert on, they began in the previous validation
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

    def expect_layers(self, method: str, layers: Sequence[str], is_whole: bool) -> None:
        """Refuse a rule that watches a key which a method of these layers never gives; see `keys_of_layers`.

        Raises:
            ValueError: if there is one; it lists the keys that may be logged.
        """
        self._labelled = [f"{key}{self._suffix}" for key in keys_of_layers(layers, is_whole)]
        common = [f"{key}{self._suffix}" for key in keys_of(method) if key not in OF_LAYER]
        self.require_keys(self._labelled + common)

    def set_aside_labels(self, values: Collection[str], method: str, others: Sequence[str] = ()) -> list[str]:
        """Do as `set_aside` with the keys that no loader has a value for, as with another label, and with others."""
        if not values:
            return []
        given = {_LOADER.sub("", key) for key in values}
        return self.set_aside([*others, *(key for key in self._labelled if key not in given)], method)

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
        fresh = trainer.strategy.broadcast({**first, **values, **_learning_rate(trainer)})
        errors: list[Exception] = [
            _unknown(key, [*{**first, **values}])
            for rule in self.rules
            for key in rule.keys
            if key not in fresh and not key.startswith(CHURN)  # which the first validation lacks
            if _LOADER.sub("", key) not in self._absent
        ]
        fired: list[Alert] = []
        for tracker in self._trackers:
            try:
                alert = tracker.observe(fresh, step=log_step(trainer), epoch=trainer.current_epoch)
            except Exception as error:  # the other rules must see the values all the same
                errors.append(error)
                continue
            fired += [] if alert is None else [alert]
        errors += self._handle(fired, trainer, pl_module)
        if errors:
            raise errors[0]

    def resume(self, trainer: Trainer) -> None:
        """Take up what the alerts of a checkpoint had begun: stops that wait, cuts that are watched.

        Call it when the training goes on; the first `observe` does it otherwise.
        """
        if self._is_resuming:
            self._is_resuming = False
            for alert in (each for event in self.alerts for each in (event, *event.others)):
                if (action := escalation(alert.rule.action, alert.number)) is not None:
                    action.resume(alert, trainer)

    def _handle(self, fired: Sequence[Alert], trainer: Trainer, pl_module: LightningModule) -> list[Exception]:
        """Record the alerts of one validation, act on them, and then show what happened; return what failed."""
        begun = len(self.alerts)
        events = [self._record(alert) for alert in fired]
        self._recent = begun
        shown, errors = set(range(begun, len(self.alerts))), list[Exception]()
        for index in sorted(shown):
            say(f"Flatness alert: {self.alerts[index]}")
        for index, alert in zip(events, fired, strict=True):
            event = self.alerts[index]
            if index < begun:
                say(f"Flatness alert, the same event as {event.rule_name} at step {event.step}: {alert}")
            done, failed = _act(event if event.rule is alert.rule else alert, trainer, pl_module)
            if done:
                self._put(index, replace(alert, done=done))
                shown.add(index)
            errors += failed
        for index in sorted(shown):
            alert = self.alerts[index]
            done = " ".join(each.done for each in (alert, *alert.others) if each.done)
            try:
                self._loggers.show(trainer, alert, done)
            except Exception as error:
                errors.append(error)
        return errors

    def _record(self, alert: Alert) -> int:
        """Add an alert to the event that another rule has just reported, or as a new one; return the event's index."""
        for index in reversed(range(self._recent, len(self.alerts))):
            event = self.alerts[index]
            if not any(each.rule is alert.rule for each in (event, *event.others)):
                self._put(index, alert)
                return index
        self.alerts.append(alert)
        return len(self.alerts) - 1

    def _put(self, index: int, alert: Alert) -> None:
        """Put an alert in the place of the earlier version of it in an event, or behind the others."""
        event = self.alerts[index]
        if event.rule is alert.rule:
            self.alerts[index] = replace(alert, others=event.others)
        else:
            others = (each for each in event.others if each.rule is not alert.rule)
            self.alerts[index] = replace(event, others=(*others, alert))

    def state_dict(self) -> dict[str, Any]:
        """Return the alerts and what the rules remember, in plain Python types."""
        return {
            "rules": [{**tracker.state_dict(), "keys": list(tracker.rule.keys)} for tracker in self._trackers],
            "alerts": [self._saved(alert) for alert in self.alerts],
            "recent": self._recent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. With another number of rules all start over; a rule that is another one, too."""
        if len(state["rules"]) != len(self.rules):
            rank_zero_warn(
                f"The checkpoint remembers {len(state['rules'])} rules and the monitor has {len(self.rules)}: "
                "they start over. Resume with the same rules to continue.",
                category=UserWarning,
            )
            return
        others = set()
        for index, (tracker, remembered) in enumerate(zip(self._trackers, state["rules"], strict=True)):
            difference = _difference(remembered, tracker.rule)
            if difference is None:
                tracker.load_state_dict(remembered)
            else:
                others.add(index)
                rank_zero_warn(f"The checkpoint remembers {difference}: it starts over.", category=UserWarning)
        self._is_resuming = True
        self.alerts.clear()  # in place: the monitor shares the list
        numbers: Counter[int] = Counter()
        for saved in state["alerts"]:
            numbers[saved["rule"]] += 1
            if saved["rule"] not in others:
                # Checkpoints from before this had neither numbers nor violations, nor several rules in one alert.
                self.alerts.append(self._loaded({"number": numbers[saved["rule"]], **saved}, others))
        self._recent = state.get("recent", len(self.alerts)) if not others else len(self.alerts)

    def _saved(self, alert: Alert) -> dict[str, Any]:
        return {field.name: getattr(alert, field.name) for field in fields(alert)} | {
            "rule": [rule is alert.rule for rule in self.rules].index(True),
            "violations": [asdict(violation) for violation in alert.violations],
            "others": [self._saved(each) for each in alert.others],
        }

    def _loaded(self, saved: Mapping[str, Any], without: Collection[int]) -> Alert:
        changed = {
            "rule": self.rules[saved["rule"]],
            "violations": tuple(Violation(**each) for each in saved.get("violations", ())),
            "others": tuple(
                self._loaded(each, without) for each in saved.get("others", ()) if each["rule"] not in without
            ),
        }
        return Alert(**{**saved, **changed})


def _act(alert: Alert, trainer: Trainer, pl_module: LightningModule) -> tuple[str, list[Exception]]:
    """Carry out the action of an alert; return what was done, in a sentence, and what failed."""
    action = escalation(alert.rule.action, alert.number)
    if action is None:
        return "", []
    try:
        done = action.apply(alert, trainer, pl_module)
    except ActionError as error:
        return str(error), [error]
    except Exception as error:
        failed = ActionError(f"{action!r} failed after an alert, which is recorded: {error!r}")
        failed.__cause__ = error
        return str(failed), [failed]
    say(f"Flatness action: {done}")
    return done, []


def _learning_rate(trainer: Trainer) -> dict[str, float]:
    """Return the largest learning rate, for alerts to tell how it changed; nothing where nothing is trained."""
    rates = [rate for optimizer in trainer.optimizers for rate in learning_rates(optimizer) if rate is not None]
    return {LEARNING_RATE: max(rates)} if rates else {}


def _unknown(key: str, logged: Sequence[str]) -> ValueError:
    return ValueError(f"A rule must watch a key that is logged; got `{key}`. Logged: {sorted(logged)}.")


def _require_called(rules: Any) -> None:
    """Refuse a function or class that makes a rule in the place of the rule."""
    for rule in rules if isinstance(rules, (list, tuple)) else [rules]:
        if callable(rule):
            name = getattr(rule, "__name__", repr(rule))
            raise ValueError(f"`rules` must hold rules; got the function `{name}`. Call it: `rules={name}(...)`.")


def _conditions(rule: AnyRule) -> Sequence[Rule]:
    """Return the conditions of a joined rule; none of another one."""
    return rule.rules if isinstance(rule, JoinedRule) else ()


def _difference(saved: Mapping[str, Any], rule: AnyRule) -> str | None:
    """Return in what way the memory in a checkpoint is that of another rule; None if it is not."""
    parts, own = saved.get("rules", ()), _conditions(rule)
    if len(parts) != len(own):
        return f"{len(parts)} conditions of the rule `{rule}`, which has {len(own)}"
    seen = set(saved.get("keys", ()))
    for part in () if seen else (parts or [saved]):  # checkpoints of earlier versions have no `keys`
        observed = [*part.get("window", ()), part.get("reference"), part.get("onset")]
        seen.update(key for each in observed if each is not None for key in each[1])
    missing = [key for key in rule.keys if seen and key not in seen]
    return f"no values of `{missing[0]}`, which the rule `{rule}` watches" if missing else None
