"""A record of the first samples is the one that they alone would have left, or there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Net, channel_norm, conv_norm_act
from recorded import certified, recorded
from torch import Tensor

from lightning_flatness.curvature.pooled.certificate import features_at
from lightning_flatness.curvature.pooled.method import _pooled_features
from lightning_flatness.recording.first_samples import first_samples

N, FEW = 64, 9  # as many samples as there are filters below: nothing tells them apart but their place
Tail = Callable[[Net, Tensor], Tensor]


def halves(h: Tensor) -> Tensor:
    """Only samples of the second half share anything."""
    first, second = h.split(N // 2)
    return torch.cat([first, second.flip(0)])


BY_SAMPLE: dict[str, Tail] = {
    "normalised": conv_norm_act,
    "skip": lambda m, h: F.relu(m.norm(m.conv(h)) + torch.cat([h] * 22, 1)[:, :64]),
    "skip, in place": lambda m, h: F.relu_(m.norm(m.conv(h)).add_(h.mean(1, keepdim=True))),
    "reshaped": lambda m, h: m.conv(h).flatten(2).sigmoid().reshape(N, 64, 5, 5),
    "a mask of each sample": lambda m, h: m.conv(h) * (h[:, :1, :1, :1] > 0),
    "beside others": lambda m, h: torch.cat([m.act(m.conv(h)), h[:, :0]], 1),
    "a factor of each filter": lambda m, h: m.conv(h) * torch.linspace(1, 2, 64)[:, None, None],
}
NOT: dict[str, Tail] = {
    "second half reversed": lambda m, h: halves(m.conv(h)),
    "batch reversed": lambda m, h: m.conv(h).flip(0),
    "mean of the batch": lambda m, h: m.conv(h) - m.conv(h).mean(0, keepdim=True),
    "one number of each sample for all filters": lambda m, h: m.conv(h) * m.conv(h).mean((1, 2, 3))[:, None, None],
    "normalised over channels": lambda m, h: channel_norm(m.conv(h)),
    "unknown": lambda m, h: torch.cumsum(m.conv(h), 3),
}


def record(tail: Tail, n: int = N) -> tuple[object, Tensor]:
    torch.manual_seed(0)
    net = Net(torch.nn.Conv2d(3, 64, 3, padding="same"), tail=tail).eval()
    x = torch.randn(n, 2, 5, 5)
    return recorded(net, x), x


@pytest.mark.parametrize("tail", BY_SAMPLE.values(), ids=BY_SAMPLE)
def test_is_that_of_the_first_samples(tail: Tail) -> None:
    whole, _ = record(tail)
    cut = _pooled_features(whole)[0]
    part = first_samples(whole, cut.end, FEW)
    assert part is not None
    assert len(part) == FEW
    expected = features_at(whole, cut, whole.points())
    torch.testing.assert_close(features_at(part, cut, part.points()), expected[:FEW])
    (node,) = whole.points()
    elsewhere = -2 * whole.points()[node].detach()
    moved = features_at(part, cut, {node: elsewhere[:FEW].requires_grad_()})
    torch.testing.assert_close(moved, features_at(whole, cut, {node: elsewhere.requires_grad_()})[:FEW])
    assert len(whole) == N  # unchanged
    torch.testing.assert_close(features_at(whole, cut, whole.points()), expected)


@pytest.mark.parametrize("tail", NOT.values(), ids=NOT)
def test_is_none_where_rows_may_depend_on_others(tail: Tail) -> None:
    whole, _ = record(tail)
    end = len(whole.graph.operations)
    assert first_samples(whole, end, FEW) is None


def test_is_none_of_few_samples() -> None:
    whole, _ = record(conv_norm_act, FEW)
    assert first_samples(whole, _pooled_features(whole)[0].end, FEW) is None


@pytest.mark.parametrize("tail", BY_SAMPLE.values(), ids=BY_SAMPLE)
def test_certifies_what_all_samples_certify(tail: Tail, monkeypatch: pytest.MonkeyPatch) -> None:
    by_few = certified(record(tail)[0])
    monkeypatch.setattr("lightning_flatness.curvature.pooled.certificate.first_samples", lambda *_: None)
    by_all = certified(record(tail)[0])
    for name in ("feature_index", "is_fed", "inactive", "cotangents"):
        assert torch.equal(getattr(by_few, name), getattr(by_all, name))
    for name in ("signature", "call", "has_second_derivative", "is_value_independent", "features_per_filter"):
        assert getattr(by_few, name) == getattr(by_all, name)
