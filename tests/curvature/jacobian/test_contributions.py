"""Where the samples are in a tensor, and whether they are coupled."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.curvature.jacobian.contributions import Structure, arranged

N, WEIGHTS, FACTORS = 3, torch.tensor([0.7, 1.3]).double(), torch.tensor([0.5, 0.9, 1.4]).double()
COTANGENTS = torch.randn(2, N, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TESTED = torch.tensordot(WEIGHTS, COTANGENTS, 1) * FACTORS[:, None, None]
PAIR = torch.cat([COTANGENTS, TESTED[None]])  # (m + 1, n, v, d)


@pytest.mark.parametrize(
    ("layout", "placed"),
    [
        ("major", PAIR.flatten(1, 2)),
        ("minor", PAIR.transpose(1, 2).flatten(1, 2)),
        ("second", PAIR.transpose(1, 2)),
        (None, PAIR.flatten(1, 2).roll(1, 1)),
        (None, PAIR.flatten(1, 2) + 1e-6 * PAIR.flatten(1, 2).flip(1)),
    ],
)
def test_the_place_of_the_samples_is_found_and_coupling_seen(layout, placed) -> None:
    assert Structure(WEIGHTS, FACTORS).layout(list(placed), has_channels=False) == layout
    if layout is not None:
        assert arranged(placed[0], N, layout).reshape(N, 8).equal(PAIR[0].reshape(N, 8))
