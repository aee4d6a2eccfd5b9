"""One pass recorded from the convolution and from the classifier, until one of them is followed."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import hooks
from torch import nn

from lightning_flatness import BothRecorder, ClassifierRecorder, ForwardRecorder, RecordedPasses, UnsupportedTailError
from lightning_flatness.errors import Refusal
from lightning_flatness.recording.both import joined
from lightning_flatness.recording.recorder import only_for


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


X, Y = torch.randn(5, 1, 4, 4), torch.arange(5) % 3


def test_both_records_are_those_of_recorders_of_their_own() -> None:
    model = network()
    with BothRecorder(model) as recorder, torch.no_grad():
        assert recorder.output is None
        loss = F.cross_entropy(model(X), Y)
        assert recorder.output is not None
        assert [recorder.depends(tensor) for tensor in (loss, X)] == [True, False]
        assert recorder.output.shape == (5, 3)
        recorder.require_recorded()
        passes = recorder.take_pass(loss)
    assert isinstance(passes, RecordedPasses)
    for each, alone in zip(passes, (ForwardRecorder(model), ClassifierRecorder(model)), strict=True):
        with alone, torch.no_grad():
            assert each.path == alone.take_pass(F.cross_entropy(model(X), Y)).path
    assert hooks(model) == 0


def test_maps_of_earlier_blocks_are_let_go() -> None:
    """Which layers matter is not known in the first pass; of the deepest convolution input and output are kept."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(4)]
    model, outputs = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(ref(output)))
    with BothRecorder(model) as recorder, torch.no_grad():
        loss = F.cross_entropy(model(torch.randn(5, 4, 6, 6)), Y)
        assert [output() is None for output in outputs] == [True, True, False, False]
        recorder.take_pass(loss)


@pytest.mark.parametrize(("kind", "layer"), [(ForwardRecorder, "0"), (ClassifierRecorder, "4")])
def test_one_that_is_followed_records_alone(kind: type[ForwardRecorder], layer: str) -> None:
    model = network()
    with BothRecorder(model) as recorder, torch.no_grad():
        recorder.take_pass(F.cross_entropy(model(X), Y))
        recorder.follow(kind)
        recorded = recorder.take_pass(F.cross_entropy(model(X), Y))
        assert (recorder.layer, recorder.classifier, recorded.layer) == (layer, "4", layer)
    assert hooks(model) == 0


def test_the_passes_of_others_are_not_recorded() -> None:
    model = network()
    with BothRecorder(model) as recorder, torch.no_grad():
        with only_for(model):
            model(X)
        assert recorder.output is None
        with only_for(recorder):
            model(X)
        assert recorder.output is not None
        recorder.clear()
        recorder.ignore_passes()
        model(X)
        assert recorder.output is None


def test_one_record_is_enough_and_without_any_both_reasons_are_given() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with BothRecorder(model) as recorder, torch.no_grad():
        loss = F.cross_entropy(model(X), Y)
        recorder.require_recorded()
        pooled, classifier = recorder.take_pass(loss)
        assert isinstance(pooled, Refusal)
        assert classifier.layer == "1"
        for refused in (recorder.require_recorded, lambda: recorder.take_pass(loss)):
            with pytest.raises(UnsupportedTailError, match=r"(?s)run a convolution.*run a linear layer"):
                refused()


def test_a_reason_that_both_give_is_given_once() -> None:
    assert joined([Refusal("a\n  path: x"), Refusal("b"), Refusal("a\n  path: y")]).message == "a\n  path: x\nb"
