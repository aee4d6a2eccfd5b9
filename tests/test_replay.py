"""An excerpt of a batch: certified like the whole, and made only where the samples go their ways alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases import MAP, SUPPORTED, UNSUPPORTED, Case
from networks import Net
from test_certificate import recorded
from torch import Tensor, nn

from lightning_flatness import replay
from lightning_flatness.certificate import certify
from lightning_flatness.replay import excerpt, recorded_points, replayed_features
from lightning_flatness.tail import NonFiniteError, UnsupportedTailError

SAMPLES = 64  # twice as many as an excerpt has


def large(case: Case, samples: int = SAMPLES) -> tuple[nn.Module, Tensor]:
    x = case.data()[0]
    return case.model().eval(), x.repeat(samples, *[1] * (x.dim() - 1))[:samples] + torch.randn(samples)[0] / 10


def named(cases: Any) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [case.name for case in cases]}


@pytest.mark.parametrize("case", **named(SUPPORTED))
def test_an_excerpt_is_certified_like_the_whole(case: Case) -> None:
    whole = recorded(*large(case))
    assert excerpt(whole) is not None
    certificate = certify(whole)
    with mock.patch.object(replay, "_EXCERPT", SAMPLES):
        expected = certify(whole)
    assert torch.equal(certificate.channels[~expected.silent], expected.channels[~expected.silent])
    assert (certificate.curved, certificate.fixed, certificate.root, certificate.signature) == (
        expected.curved,
        expected.fixed,
        expected.root,
        expected.signature,
    )
    assert torch.equal(certificate.silent, expected.silent)


@pytest.mark.parametrize("case", **named(UNSUPPORTED))
def test_what_is_refused_stays_refused(case: Case) -> None:
    with pytest.raises((UnsupportedTailError, NonFiniteError)) as refused:
        certify(recorded(*large(case)))
    with (
        mock.patch.object(replay, "_EXCERPT", SAMPLES),
        pytest.raises(refused.type, match=re.escape(str(refused.value))),
    ):
        certify(recorded(*large(case)))


def test_an_excerpt_is_a_part_of_the_whole() -> None:
    whole = recorded(*large(SUPPORTED[0], 2 * SAMPLES + 3))
    part = excerpt(whole)
    assert part is not None
    features, some = (replayed_features(each, recorded_points(each)) for each in (whole, part))
    torch.testing.assert_close(some, features[::4])
    assert len(some) == SAMPLES // 2 + 1


def halves(h: Tensor) -> Tensor:
    first, second = h.relu().chunk(2)
    return torch.cat([first, second + first])


# (after the convolution, samples): what an excerpt would not see, or not understand
NO_EXCERPT: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "few samples": (lambda net, h: h.relu(), SAMPLES - 1),
    "the mean of the batch": (lambda net, h: h - h.mean(0), SAMPLES),
    "the sample before": (lambda net, h: h + h.roll(1, 0), SAMPLES),
    "the sample of an excerpt's step before": (lambda net, h: h + h.roll(2, 0), SAMPLES),
    "halves of the batch": (lambda net, h: halves(h), SAMPLES),
    "pairs": (lambda net, h: h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0), SAMPLES),
    "the last sample": (lambda net, h: h + h[-1:], SAMPLES),
    "half a batch before": (lambda net, h: h + h.roll(SAMPLES // 2, 0), SAMPLES),
}


@pytest.mark.parametrize("name", NO_EXCERPT)
def test_no_excerpt(name: str) -> None:
    step, samples = NO_EXCERPT[name]
    x = torch.randn(samples, *MAP[1:], dtype=torch.float64)
    recording = recorded(Net(tail=lambda net, x: step(net, net.conv(x))).double().eval(), x)
    assert excerpt(recording) is None
