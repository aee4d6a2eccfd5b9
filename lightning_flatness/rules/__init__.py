"""Rules: when a monitored value calls for an alert, and what the alert says. Standard library only."""

from lightning_flatness.rules.alert import Action, Alert
from lightning_flatness.rules.joined import AllOf, AnyOf
from lightning_flatness.rules.presets import default, divergence, label_noise, memorisation
from lightning_flatness.rules.rule import Rule

__all__ = ["Action", "Alert", "AllOf", "AnyOf", "Rule", "default", "divergence", "label_noise", "memorisation"]
