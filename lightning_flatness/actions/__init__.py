"""Actions: what an alert does to a training. Beside them, the checkpoint that is worth keeping."""

from lightning_flatness.actions.checkpoints import FlattestCheckpoint
from lightning_flatness.actions.learning_rate import cut_learning_rate, learning_rates
from lightning_flatness.actions.training import Notify, ReduceLR, StopTraining, action_text, escalation

__all__ = [
    "FlattestCheckpoint",
    "Notify",
    "ReduceLR",
    "StopTraining",
    "action_text",
    "cut_learning_rate",
    "escalation",
    "learning_rates",
]
