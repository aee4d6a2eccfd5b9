"""Stops a training when Lightning permits it, and not before."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def stop_when_permitted(trainer: Trainer) -> None:
    """Stop the training at once, or as soon as `min_epochs` and `min_steps` are reached.

    `trainer.should_stop` is not raised before: as long as it is and the training goes on, Lightning logs at every step
    (its issue 19990). Every process has to call this.
    """
    if may_stop(trainer):
        trainer.should_stop = True
    elif not any(isinstance(callback, HeldStop) for callback in _callbacks(trainer)):
        # In a new list, since Lightning may be iterating over the old one, and before all checkpoints.
        trainer.callbacks = [HeldStop(), *_callbacks(trainer)]  # type: ignore[attr-defined]


def may_stop(trainer: Trainer, epochs: int | None = None) -> bool:
    """Return whether a training has reached `min_epochs` and `min_steps`.

    Args:
        trainer: the Trainer.
        epochs: how many epochs have been completed; None: as many as the Trainer says.
    """
    epochs = trainer.current_epoch if epochs is None else epochs
    return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)


class HeldStop(Callback):
    """A stop that has been asked for too early: it looks after each step and each epoch whether it may come.

    It adds itself to the Trainer's callbacks in `stop_when_permitted`, and leaves them when it is over.
    """

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop amid an epoch."""
        self._stop_if(may_stop(trainer), trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch, which the Trainer does not count as completed yet."""
        self._stop_if(may_stop(trainer, trainer.current_epoch + 1), trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the callbacks: the training has ended otherwise."""
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the callbacks."""
        self._leave(trainer)

    def _stop_if(self, permitted: bool, trainer: Trainer) -> None:
        if permitted:
            trainer.should_stop = True
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        trainer.callbacks = [each for each in _callbacks(trainer) if each is not self]  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
