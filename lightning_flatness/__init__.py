"""Exact flatness of convolutional networks, watched while they train."""

from lightning_flatness.actions import Notify, ReduceLR, StopTraining
from lightning_flatness.callback import FlatnessMonitor
from lightning_flatness.curvature.pooled.derivatives import TailFactors
from lightning_flatness.curvature.pooled.measurement import Tap
from lightning_flatness.measure import FlatnessReport, measure
from lightning_flatness.recording.recorded_pass import NonFiniteError, UnsupportedTailError
from lightning_flatness.rules import AllOf, AnyOf, Rule
from lightning_flatness.rules.alert import Action, Alert

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Alert",
    "AllOf",
    "AnyOf",
    "FlatnessMonitor",
    "FlatnessReport",
    "NonFiniteError",
    "Notify",
    "ReduceLR",
    "Rule",
    "StopTraining",
    "TailFactors",
    "Tap",
    "UnsupportedTailError",
    "measure",
]
