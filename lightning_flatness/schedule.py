"""Which validations are measured, and what is said at the start about those that never will be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_flatness.rules import AllOf, AnyOf, Rule
from lightning_flatness.rules.detectors import WINDOW

PARTIAL = (
    "measured a part of this validation, which no rule judges: the training goes on from a checkpoint that was saved "
    "amid a validation, and Lightning does not run that from its beginning. Save checkpoints when it has ended."
)
"""Said about the first validation of a resumed training, if it is incomplete."""
_LARGE_RISE = 10.0  # as a fraction: 1000 %; a larger one is probably meant in per cent


class Schedule:
    """Counts the validations of a training, and says which of them are measured.

    In a training these are the first one after its start and every n-th of all that were completed before. A validation
    that somebody asks for outside of `fit` is always measured, and not counted; so is the sanity check.

    Args:
        every: n.

    Attributes:
        completed: number of validations of this training that were completed, before a resumption too.
        is_resuming: whether the training goes on from a checkpoint and none has been completed since.

    Example:
        >>> schedule = Schedule(every=2)
        >>> schedule.start()
        >>> schedule.completed
        0
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.completed = 0
        self.is_resuming = False
        self._is_first = True

    def start(self) -> None:
        """Begin a training."""
        self.completed, self.is_resuming, self._is_first = 0, False, True

    def resume(self, completed: int) -> None:
        """Go on with a training of which so many validations were completed."""
        self.completed, self.is_resuming = completed, True

    def catch_up(self, trainer: Trainer) -> None:
        """Count the validation that Lightning leaves out where a training goes on.

        A checkpoint that is saved at the end of a batch, before the validation that is due then, does not count it,
        and Lightning goes on behind it.
        """
        # A private method and attribute, as seen in Lightning 2.6.6.
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if self.is_resuming and loop.restarted_on_train_batch_end and fetcher is not None:
            self.completed += bool(loop._should_check_val_fx(fetcher))

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether the validation that starts is measured.

        Lightning forgets all metrics when a training starts, a resumed one too, and other callbacks fail if their key
        is missing afterwards: the first validation is always due.
        """
        return not counts(trainer) or self._is_first or self.is_judged()

    def is_judged(self) -> bool:
        """Return whether rules see this validation: one that is due for the start of a resumed training alone is not.

        The rules of a resumed training see the values that they would have seen without the interruption.
        """
        return self.completed % self.every == 0

    def complete(self, trainer: Trainer) -> None:
        """Count a validation, at its end."""
        if counts(trainer):
            self.completed, self.is_resuming, self._is_first = self.completed + 1, False, False


def counts(trainer: Trainer) -> bool:
    """Return whether the validation that runs is one of a training, and no sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def planned_validations(trainer: Trainer) -> float:
    """Return how many validations a training has at most, from its first epoch on; infinity if that is unknown."""
    if not trainer.enable_validation or (trainer.num_val_batches and sum(trainer.num_val_batches) == 0):
        return 0
    between, batches = trainer.val_check_batch, float(trainer.num_training_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps * trainer.accumulate_grad_batches)
    if between is None:  # by the clock
        return math.inf
    if trainer.check_val_every_n_epoch is None:
        total = min(steps, math.inf if math.isinf(epochs) else epochs * batches)
        return total // between if math.isfinite(total) else math.inf
    if math.isfinite(batches) and math.isfinite(steps):
        epochs = min(epochs, math.ceil(steps / max(batches, 1)))
    if math.isinf(epochs) or (math.isinf(batches) and math.isfinite(between)):
        return math.inf
    per_epoch = 1 if math.isinf(between) else batches // between
    return epochs // trainer.check_val_every_n_epoch * per_epoch


def notices(trainer: Trainer, rules: Sequence[Rule | AllOf | AnyOf], every: int) -> Iterator[str]:
    """Yield one sentence about each thing that the user has asked for and that this training will not do.

    Args:
        trainer: the Trainer, at the start of its training.
        rules: of the monitor.
        every: `every_n_validations` of the monitor.
    """
    planned = planned_validations(trainer)
    if planned == 0:
        judged = " and judges no rule" if rules else ""
        yield (
            f"measures nothing{judged} in this training: it has no validation. Give `fit` validation data and the "
            "module a `validation_step`, with `limit_val_batches` above 0 and validations before the last epoch ends."
        )
    elif trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    measured = math.ceil(planned / every) if math.isfinite(planned) else math.inf
    if measured > 0 and (late := [str(rule) for rule in rules if _least_validations(rule) > measured]):
        yield (
            f"measures {measured:g} validations at most in this training, too few for these rules to fire: {late}. "
            "Validate more often (`val_check_interval`), or in more epochs."
        )
    for rule in _single(rules):
        if rule.condition == "rise" and rule.limit >= _LARGE_RISE:
            yield (
                f"has a rule that fires when `{rule.monitor}` is {1 + rule.limit:g} times its reference "
                f"(`rise={rule.limit:g}`). If {rule.limit:g} % above it was meant, write `rise={rule.limit / 100:g}`."
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if done := _chooses_by_flatness(callback):
            yield (
                f"runs beside `{type(callback).__name__}(monitor={callback.monitor!r})`, which {done}: an untrained "
                "network is the flattest. Let a metric of your own decide first, as `FlattestCheckpoint(monitor="
                "'val_acc', mode='max', tolerance=0.005)` does."
            )


def _chooses_by_flatness(callback: Callback) -> str:
    """Return what a callback that minimises flatness does to a healthy training, in words; empty: it does not."""
    kind, minimises = type(callback), getattr(callback, "mode", "") == "min"
    if not minimises or not str(getattr(callback, "monitor", "")).startswith("flatness/"):
        return ""
    if issubclass(kind, EarlyStopping):
        return "ends a healthy training early"
    return "keeps an early checkpoint" if issubclass(kind, ModelCheckpoint) else ""


def _least_validations(rule: Rule | AllOf | AnyOf) -> int:
    """Return how many validations a rule needs before it can fire."""
    if isinstance(rule, Rule):
        needs_window = rule.condition.startswith("shift") or (rule.condition == "rise" and rule.reference == "settled")
        needs_reference = rule.condition == "rise" and not needs_window
        return rule.warmup + (WINDOW if needs_window else int(needs_reference)) + rule.patience
    members = [_least_validations(each) for each in rule.rules]
    return max(rule.warmup, (max if isinstance(rule, AllOf) else min)(members) - 1) + rule.patience


def _single(rules: Sequence[Rule | AllOf | AnyOf]) -> Iterator[Rule]:
    for rule in rules:
        yield from [rule] if isinstance(rule, Rule) else rule.rules
