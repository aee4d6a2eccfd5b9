"""The derivatives of a batch: parts of it, other dtypes, the columns that filters feed."""

from __future__ import annotations

import torch
from metrics.checks import derivatives

PER_SAMPLE = ("inputs", "jacobian", "second_derivative", "features", "logits", "target")


def test_a_part_has_the_rows_of_its_samples() -> None:
    whole = derivatives("silu")
    part = whole.select(slice(1, 4))
    assert (len(whole), len(part)) == (5, 3)
    for name in PER_SAMPLE:
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:4])
    for name in ("kernel_gram", "head", "feature_index", "geometry", "loss"):
        assert getattr(part, name) is getattr(whole, name)


def test_another_dtype_is_that_of_all_floating_tensors() -> None:
    single = derivatives("silu").to(torch.float32)
    assert {getattr(single, name).dtype for name in ("inputs", "jacobian", "logits", "head")} == {torch.float32}
    assert single.target.dtype == torch.float32  # labels with their weights
    assert single.feature_index.dtype == torch.int64


def test_used_columns_are_those_that_the_filters_feed() -> None:
    """A dense block: the first features are not the convolution's."""
    whole = derivatives("dense block")
    assert torch.equal(whole.used_head, whole.head[:, 3:])
    assert whole.features_per_filter == 1
    assert derivatives("relu").second_derivative is None


def test_features_of_a_filter_follow_each_other() -> None:
    whole = derivatives("average and max")
    assert whole.features_per_filter == 2
    assert torch.equal(whole.used_head, whole.head[:, [0, 4, 1, 5, 2, 6, 3, 7]])
    some = derivatives("two features for some filters")
    columns = some.head[:, [0, 0, 1, 4, 2, 5, 3, 0]] * torch.tensor([1, 0, 1, 1, 1, 1, 1, 0])
    assert torch.equal(some.used_head, columns)
