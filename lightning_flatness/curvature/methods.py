"""Which method measures a network: the decision, and the methods by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from torch import nn

from lightning_flatness.curvature.classifier import ClassifierMethod
from lightning_flatness.curvature.jacobian.method import JacobianMethod, LayerQuantities
from lightning_flatness.curvature.pooled.method import PooledMethod
from lightning_flatness.curvature.quantities import SampleQuantities
from lightning_flatness.errors import Refusal, UnrepeatableError
from lightning_flatness.recording.both import BothRecorder, RecordedPasses, joined, verdict
from lightning_flatness.recording.classifier import ClassifierRecorder
from lightning_flatness.recording.layers import modules_by_name
from lightning_flatness.recording.layers_recorder import LayersRecorder
from lightning_flatness.recording.recorded_pass import RecordedPass
from lightning_flatness.recording.recorder import ForwardRecorder

MethodName: TypeAlias = Literal["auto", "pooled", "classifier", "jacobian"]
"""What can be asked for."""
METHODS: tuple[MethodName, ...] = ("auto", "pooled", "classifier", "jacobian")
LayerName: TypeAlias = str | Sequence[str] | None
"""Which layer is measured; several, or `"all"`, by `"jacobian"`."""


@dataclass(frozen=True)
class Choice:
    """The method that measures a network.

    Attributes:
        name: of the method, `"pooled"` or `"classifier"`.
        layer: name of the layer that it measures.
        reason: why it was chosen, one sentence.
    """

    name: str
    layer: str
    reason: str


class AutoMethod:
    """Chooses the method by the first pass that one can measure, see `select_method`, and keeps it from then on.

    Args:
        recorder: the recorder of the passes; it is told to follow the chosen layer alone.
        chunk_bytes: how much memory the contractions may take at once, in bytes; None: see `chunk_bytes_on`.
        scale_free: whether to compute what scale-free flatness needs.

    Attributes:
        choice: what was chosen; None: nothing so far.
    """

    name = "auto"

    def __init__(
        self, recorder: BothRecorder | None = None, chunk_bytes: int | None = None, scale_free: bool = True
    ) -> None:
        """Start without a choice."""
        self._recorder = recorder
        self._pooled, self._classifier = (
            PooledMethod(chunk_bytes, scale_free),
            ClassifierMethod(chunk_bytes, scale_free),
        )
        self.choice: Choice | None = None

    def quantities(self, recorded: RecordedPass | RecordedPasses, samples: slice = slice(None)) -> SampleQuantities:
        """Return the quantities of a recorded pass by the chosen method; arguments and errors are those of a method."""
        if isinstance(recorded, RecordedPass):
            return self.chosen.quantities(recorded, samples)
        pooled = _measured(self._pooled, recorded.pooled, samples)
        if isinstance(pooled, Refusal):
            if isinstance(pooled.cause, UnrepeatableError):
                raise pooled.error()
            reason = pooled.message.splitlines()[0]
        elif pooled[1].curvature == "hessian":
            return self._chosen(self._pooled, pooled, "Every step from the convolution to the loss is certified.")
        else:
            reason = f"The head behind `{pooled[0]}` is large and curved; only its Gauss-Newton part is measured there."
        own = _measured(self._classifier, recorded.classifier, samples)
        if not isinstance(own, Refusal):
            return self._chosen(self._classifier, own, reason)
        if isinstance(pooled, Refusal):
            raise joined([pooled, own]).error()
        return self._chosen(self._pooled, pooled, f"{reason} The classifier is not measured: {own.message}")

    @property
    def chosen(self) -> PooledMethod | ClassifierMethod:
        """The method that measures passes of which only the chosen layer was recorded."""
        return self._classifier if self.choice and self.choice.name == "classifier" else self._pooled

    def _chosen(
        self, method: PooledMethod | ClassifierMethod, measured: tuple[str, SampleQuantities], reason: str
    ) -> SampleQuantities:
        """Keep a choice, and return the quantities of its layer."""
        layer, quantities = measured
        self.choice = Choice(method.name, layer, reason)
        if self._recorder is not None:
            self._recorder.follow(ForwardRecorder if method is self._pooled else ClassifierRecorder)
        return quantities


Recorder: TypeAlias = ForwardRecorder | BothRecorder
Method: TypeAlias = PooledMethod | ClassifierMethod | AutoMethod | JacobianMethod
Tools: TypeAlias = tuple[Recorder, Method]
Quantities: TypeAlias = SampleQuantities | LayerQuantities


def select_method(recorded: RecordedPasses) -> Choice:
    """Return which method measures a network, on which layer, and why.

    The first of these that is exact is taken:

    1. **`"pooled"`**: the deepest convolution, in closed form, if every link from it to the loss is certified: each of
       its filters reaches one pooled feature on its own, as under normalisation in eval mode, activations, skips and a
       global pooling.
    2. **`"classifier"`**: the classifier's own weight, in closed form. The classifier is the last linear layer that the
       loss depends on; what lies before it may be anything (attention, gates, recurrence), and what lies behind it any
       differentiable function of its output that is a sum over samples.
    3. **`"pooled"`** where the head is curved and too large, so that only the Gauss-Newton part is measured.
    4. None: the refusal, with the reasons of both.

    A pass that draws random numbers, or that the recorded operations do not explain, is refused at once: no other layer
    is taken in its place. Name the method if one is wanted.

    Args:
        recorded: one pass, as a `BothRecorder` takes it.

    Raises:
        UnsupportedTailError: if no method is exact.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatness import BothRecorder, select_method
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> with BothRecorder(network) as recorder, torch.no_grad():
        ...     loss = nn.functional.cross_entropy(network(torch.ones(2, 1, 2, 2)), torch.tensor([0, 1]))
        ...     choice = select_method(recorder.take_pass(loss))
        >>> choice.name, choice.layer
        ('classifier', '3')
        >>> print(choice.reason)
        A forward pass must run a convolution that is more than a linear layer; none did. The model has no convolution.
    """
    method = AutoMethod()
    method.quantities(recorded, slice(1))
    assert method.choice is not None
    return method.choice


def method_for(
    model: nn.Module,
    method: str = "auto",
    layer: LayerName = None,
    classifier: str | None = None,
    chunk_bytes: int | None = None,
    *,
    scale_free: bool = True,
    estimate: bool = False,
) -> tuple[Recorder, Method]:
    """Return a recorder of a model and the method that measures its passes.

    Args:
        model: any module whose forward pass will run.
        method: `"auto"`: see `select_method`, but a named layer is not replaced by another one; `"pooled"`;
            `"classifier"`; `"jacobian"`.
        layer: name of the convolution; None: found. For `"jacobian"` one name, several, or `"all"`.
        classifier: name of the linear classifier; None: found.
        chunk_bytes: how much memory the contractions may take at once, in bytes; None: see `chunk_bytes_on`.
        scale_free: whether to compute what scale-free flatness needs.
        estimate: two backward passes instead of all; for `"jacobian"` only.

    Raises:
        ValueError: if the method is unknown, cannot estimate or measures no named layer, or a named module is not
            there.
    """
    require_method(method, layer, classifier)
    if estimate and method != JacobianMethod.name:
        raise ValueError(
            f'`estimate=True` needs `method="jacobian"`; got {method!r}, which is exact at less cost. Leave it out.'
        )
    if method == JacobianMethod.name:
        names = layer if layer == "all" else tuple(dict.fromkeys(require_layers(layer)))
        recorder = LayersRecorder(model, cast('tuple[str, ...] | Literal["all"]', names))
        return recorder, JacobianMethod(chunk_bytes, estimate)
    layer = cast("str | None", layer)
    if method == ClassifierMethod.name:
        return ClassifierRecorder(model, classifier), ClassifierMethod(chunk_bytes, scale_free)
    if method == PooledMethod.name or layer is not None:
        return ForwardRecorder(model, layer, classifier), PooledMethod(chunk_bytes, scale_free)
    both = BothRecorder(model, classifier)
    return both, AutoMethod(both, chunk_bytes, scale_free)


def encoded_choice(choice: Choice | None, model: nn.Module) -> int:
    """Return a choice as a number, which processes can exchange: 0 for none; the layer of a classifier is in it."""
    if choice is None:
        return 0
    return 1 if choice.name == PooledMethod.name else 2 + list(modules_by_name(model)).index(choice.layer)


def common_choice(own: Choice | None, model: nn.Module, total: int, squares: int, choosers: int) -> Choice | None:
    """Return the choice of all processes: that of the others if this one has none.

    Args:
        own: the choice of this process.
        model: the network.
        total: sum of the choices as numbers, see `encoded_choice`, over all processes.
        squares: sum of their squares.
        choosers: how many processes have chosen.

    Raises:
        ValueError: if they have chosen different layers.
    """
    if choosers * squares != total**2:
        raise ValueError(
            "All processes must measure the same layer; they have chosen different ones. Name the method, as "
            '`method="classifier"`.'
        )
    if own is not None or not choosers:
        return own
    code, reason = total // choosers, "Another process has chosen it."
    if code == 1:
        return Choice(PooledMethod.name, "", reason)
    return Choice(ClassifierMethod.name, list(modules_by_name(model))[code - 2], reason)


def chosen_record(recorded: RecordedPass | RecordedPasses, method: Method) -> RecordedPass:
    """Return the record that was measured; of two it is that of the method that was chosen."""
    if isinstance(recorded, RecordedPass):
        return recorded
    return cast(RecordedPass, getattr(recorded, cast(Choice, cast(AutoMethod, method).choice).name))


def reason_of(choice: Choice | None) -> str:
    """Return why the classifier is measured instead of a convolution, and how to forbid it; empty if it is not."""
    if choice is None or choice.name == "pooled":
        return ""
    return (
        f', the classifier\'s own weight (`method="{choice.name}"`), since no convolution has an exact value: '
        f'{choice.reason.rstrip(".")}. `method="pooled"` forbids that'
    )


def require_method(method: str, layer: LayerName, classifier: str | None = None, needs_one: bool = False) -> None:
    """Refuse the name of a method that does not exist, or that does not measure the named layer.

    Args:
        method: the name.
        layer: what to measure.
        classifier: name of the classifier.
        needs_one: whether the values of each sample are kept, which needs a single layer.

    Raises:
        ValueError: if it is refused.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(METHODS)}; got {method!r}.")
    if method == ClassifierMethod.name and layer is not None:
        raise ValueError(
            f'`method="classifier"` measures the classifier, not a convolution; got `layer={layer!r}`. Name the '
            "linear layer with `classifier=...`, or leave `layer` out."
        )
    if method == JacobianMethod.name:
        require_layers(layer)
        if classifier is not None:
            raise ValueError(
                f'`method="jacobian"` measures the layers that `layer` names; got `classifier={classifier!r}`. Name '
                "it among them."
            )
        if needs_one and (layer == "all" or not isinstance(layer, str)):
            raise ValueError(f"`per_sample` needs one layer, whose flatness each sample has; got `layer={layer!r}`.")
    elif not (layer is None or isinstance(layer, str)) or layer == "all":
        raise ValueError(
            f"`layer` must be the name of one convolution; got {layer!r}. Several layers, or all, are measured by "
            '`method="jacobian"`.'
        )


def require_layers(layer: LayerName) -> tuple[str, ...]:
    """Return the names of layers; refuse what is none.

    Raises:
        ValueError: if no layer is named.
    """
    names = (layer,) if isinstance(layer, str) else tuple(layer or ())
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'`method="jacobian"` needs the layers to measure; got `layer={layer!r}`. Give a name, a list of names, '
            'or "all": `layer="all"`.'
        )
    return names


def _measured(
    method: PooledMethod | ClassifierMethod, recorded: RecordedPass | Refusal, samples: slice
) -> tuple[str, SampleQuantities] | Refusal:
    """Return the name of the layer and its quantities, or why there are none."""
    if isinstance(recorded, Refusal):
        return recorded
    quantities: SampleQuantities | Refusal = verdict(lambda: method.quantities(recorded, samples))
    return quantities if isinstance(quantities, Refusal) else (recorded.layer, quantities)
