"""The names of per-sample values: of one layer, of several, of the network."""

from __future__ import annotations

import torch

from lightning_flatness import LayerQuantities, SampleQuantities
from lightning_flatness.metrics.samples import per_sample_values

ONES = torch.ones(2)
FIRST, SECOND = (SampleQuantities(i * ONES, 10 * i * ONES, ONES, output_margin=-i * ONES) for i in (1, 2))


def test_values_of_all_batches_by_name() -> None:
    one = per_sample_values([FIRST, SECOND])
    assert one["hessian_trace"].tolist() == [1, 1, 2, 2]
    assert set(one) == {"hessian_trace", "relative_flatness", "confidence", "output_margin"}
    several = per_sample_values([LayerQuantities({"a": FIRST, "b": SECOND}, 3 * ONES)])
    assert several["network_trace"].tolist() == [3, 3]
    assert several["relative_flatness/b"].tolist() == [20, 20]
    assert {name for name in several if "/" not in name} == {"network_trace", "confidence", "output_margin"}


def test_what_a_batch_lacks_is_left_out() -> None:
    part = LayerQuantities({"a": FIRST}, 3 * ONES)
    assert set(per_sample_values([part, LayerQuantities({"a": FIRST})])) == {*per_sample_values([FIRST])}
