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

from lightning_flatness import certificate as certificates
from lightning_flatness import replay
from lightning_flatness.curvature.pooled.certificate import certify
from lightning_flatness.curvature.pooled.measurement import Tap
from lightning_flatness.curvature.pooled.subset import excerpt, recorded_points, replayed_features
from lightning_flatness.recording.recorded_pass import NonFiniteError, UnsupportedTailError

ORDINARY = ("relu", "relu in place", "silu", "residual", "residual in place", "projected shortcut", "conv3d", "dropout")
SAMPLES = 64  # twice as many as an excerpt has


def large(case: Case, samples: int = SAMPLES) -> tuple[nn.Module, Tensor]:
    x = case.data()[0]
    x = x.repeat(samples, *[1] * (x.dim() - 1))[:samples]
    return case.model().eval(), x + torch.randn_like(x) / 10


def named(cases: Any) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [case.name for case in cases]}


@pytest.mark.parametrize("case", **named(SUPPORTED))
def test_an_excerpt_is_certified_like_the_whole(case: Case) -> None:
    whole = recorded(*large(case))
    whole_or_part = certificates._certified_at_generic_points
    with mock.patch.object(certificates, "_certified_at_generic_points", wraps=whole_or_part) as certified:
        certificate = certify(whole)
    sizes = [len(call.args[0].classifier.inputs) for call in certified.call_args_list]
    assert sizes == [SAMPLES if excerpt(whole) is None else SAMPLES // 2]
    assert case.name not in ORDINARY or sizes == [SAMPLES // 2]
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


def by_sample(even: Tensor, odd: Tensor) -> Tensor:
    return torch.stack([even, odd]).repeat(SAMPLES // 2, *[1] * even.dim())


def adapted(h: Tensor) -> Tensor:
    """Every second sample's filters are mixed."""
    matrices = by_sample(torch.eye(4).to(h), torch.ones(4, 4).to(h))
    return (h.unsqueeze(1) * matrices[..., None, None]).sum(2).relu()


def halves(h: Tensor) -> Tensor:
    first, second = h.relu().chunk(2)
    return torch.cat([first, second + first])


# (after the convolution, whether the closed form holds): what an excerpt would not see, or not understand
NO_EXCERPT: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "the mean of the batch": (lambda h: h + h.mean(0), False),
    "the sample before": (lambda h: h + h.roll(1, 0), False),
    "the sample of an excerpt's step before": (lambda h: h + h.roll(2, 0), False),
    "half a batch before": (lambda h: h + h.roll(SAMPLES // 2, 0), False),
    "halves of the batch": (halves, False),
    "pairs": (lambda h: h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0), False),
    "the last sample": (lambda h: h + h[-1:], False),
    "a matrix for each sample": (adapted, False),
    "a factor for each sample": (lambda h: h * by_sample(h.new_ones(4, 1, 1), h.new_zeros(4, 1, 1)), True),
    "an index for each sample": (lambda h: h.relu()[torch.arange(len(h))], True),
}


@pytest.mark.parametrize("name", NO_EXCERPT)
def test_no_excerpt(name: str) -> None:
    step, exact = NO_EXCERPT[name]
    x = torch.randn(SAMPLES, *MAP[1:], dtype=torch.float64)
    recording = recorded(Net(tail=lambda net, x: step(net.conv(x))).double().eval(), x)
    with mock.patch.object(replay, "replayed_features") as replayed:
        assert excerpt(recording) is None
    assert replayed.called == (name == "the mean of the batch")
    assert excerpt(recording) is None
    if exact:
        assert certify(recording).channels.tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(UnsupportedTailError):
            certify(recording)


def test_a_later_batch_that_is_wired_otherwise_is_refused() -> None:
    """The first batch's matrices, one for each sample, leave the filters apart; the second's mix them."""
    matrices = torch.eye(4).double().expand(6, 4, 4).clone()
    model = Net(tail=lambda net, x: (net.conv(x).unsqueeze(1) * matrices.clone()[..., None, None]).sum(2).relu())
    model, x = model.double().eval(), torch.randn(6, *MAP[1:], dtype=torch.float64)
    with Tap(model) as tap, torch.no_grad():
        model(x)
        tap.factors()
        matrices[3] = 1
        model(x)
        with pytest.raises(UnsupportedTailError):
            tap.factors()


def test_no_excerpt_of_a_small_batch_or_of_what_is_not_finite() -> None:
    case = SUPPORTED[0]
    assert excerpt(recorded(*large(case, SAMPLES - 1))) is None
    model, x = large(case)
    x[0] = torch.inf
    assert excerpt(recorded(model, x)) is None
    x[0] = 1
    assert excerpt(recorded(model, x)) is not None


def test_the_kept_values_stay_what_they_are() -> None:
    recording = recorded(*large(next(case for case in SUPPORTED if case.name == "residual in place")))
    before = [kept.value.clone() for kept in recording.tape._kept]
    certify(recording)
    assert all(map(torch.equal, before, (kept.value for kept in recording.tape._kept)))
