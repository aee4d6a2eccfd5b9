"""What a method returns: parts of a batch, and what it did not give."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.curvature.quantities import SampleQuantities, given

VALUES = torch.arange(4.0)
WHOLE = SampleQuantities(VALUES, VALUES + 1, VALUES + 2, scaled_flatness=VALUES[:, None], head_squared_norm=VALUES[3])


def test_a_part_has_the_values_of_its_samples() -> None:
    part = WHOLE.select(slice(1, 3))
    assert (len(WHOLE), len(part)) == (4, 2)
    assert part.hessian_trace.tolist() == [1, 2]
    assert part.scaled_flatness.tolist() == [[1], [2]]
    assert part.head_squared_norm == 3  # of the batch, not of a sample
    assert part.output_margin is None
    assert part.curvature == "hessian"
    assert torch.equal(WHOLE.cpu().relative_flatness, WHOLE.relative_flatness)


def test_what_a_method_did_not_give_is_named() -> None:
    assert given(WHOLE.confidence, "confidence") is WHOLE.confidence
    with pytest.raises(ValueError, match="needs `output_margin` of every sample; the quantities have none"):
        given(WHOLE.output_margin, "output_margin")
