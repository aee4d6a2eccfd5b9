"""Rules: when a monitored value calls for an alert, and what the alert says. Standard library only."""

from lightning_flatness.rules.alert import Action, Alert, Violation
from lightning_flatness.rules.presets import default, divergence, label_noise, memorisation, misclassification
from lightning_flatness.rules.rule import AllOf, AnyOf, Rule
from lightning_flatness.rules.tracker import RuleTracker

__all__ = [
    "Action",
    "Alert",
    "AllOf",
    "AnyOf",
    "Rule",
    "RuleTracker",
    "Violation",
    "default",
    "divergence",
    "label_noise",
    "memorisation",
    "misclassification",
]
