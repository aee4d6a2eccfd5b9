"""Exact flatness of convolutional networks, watched while they train."""

from lightning_flatness.actions import FlattestCheckpoint, Notify, ReduceLR, StopTraining
from lightning_flatness.callback import FlatnessMonitor
from lightning_flatness.curvature.classifier import ClassifierMethod
from lightning_flatness.curvature.jacobian.method import JacobianMethod, LayerQuantities
from lightning_flatness.curvature.methods import Choice, select_method
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import NonFiniteError, UnsupportedTailError
from lightning_flatness.measure import FlatnessReport, LayerFlatness, compare, measure
from lightning_flatness.recording.both import BothRecorder, RecordedPasses
from lightning_flatness.recording.classifier import ClassifierRecorder
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.recording.recorded_layers import RecordedLayers
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder
from lightning_flatness.reporting.page import html_report
from lightning_flatness.rules import Action, Alert, AllOf, AnyOf, Rule
from lightning_flatness.spectrum import LayerSpectrum, spectrum

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  grouped by what they are for
    # Watch a training, act on it.
    "FlatnessMonitor",
    "Rule",
    "AllOf",
    "AnyOf",
    "Action",
    "Alert",
    "StopTraining",
    "ReduceLR",
    "Notify",
    "FlattestCheckpoint",
    "html_report",
    # Measure a model once.
    "measure",
    "FlatnessReport",
    "LayerFlatness",
    "spectrum",
    "LayerSpectrum",
    "compare",
    # The parts behind both.
    "ForwardRecorder",
    "RecordedPass",
    "PooledMethod",
    "ClassifierRecorder",
    "ClassifierMethod",
    "BothRecorder",
    "RecordedPasses",
    "select_method",
    "Choice",
    "SampleQuantities",
    "LayersRecorder",
    "RecordedLayers",
    "JacobianMethod",
    "LayerQuantities",
    # What is raised.
    "UnsupportedTailError",
    "NonFiniteError",
]
