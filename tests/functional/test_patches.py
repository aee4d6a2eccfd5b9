"""Patches and Gram matrices against the convolution itself, in float64."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_flatness.functional import ConvGeometry, gram_factors, patch_gram, patch_squared_norm, patches

MODULE = sys.modules[ConvGeometry.__module__]  # `functional.patches` is the function of that name
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# (in_channels, spatial shape, kernel, options)
CASES: dict[str, tuple[int, tuple[int, ...], Any, dict[str, Any]]] = {
    "1d": (3, (7,), 3, {}),
    "1d stride over the edge": (2, (8,), 3, {"stride": 3, "padding": 1}),
    "1d dilated": (2, (9,), 3, {"dilation": 3, "padding": 3}),
    "2d": (3, (5, 4), 3, {"padding": 1}),
    "2d by axis": (2, (6, 7), (1, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "1x1": (5, (3, 4), 1, {}),
    "1x1 stride": (5, (4, 5), 1, {"stride": 2}),
    "1x1 more padding than kernel": (3, (3, 3), 1, {"padding": 2, "stride": 2}),
    "valid": (2, (5, 5), 3, {"padding": "valid"}),
    "same even": (2, (5, 4), (4, 2), {"padding": "same"}),
    "same even dilated": (2, (5, 6), 2, {"padding": "same", "dilation": 3}),
    "reflect": (2, (5, 4), 3, {"padding": (2, 1), "padding_mode": "reflect"}),
    "replicate same even": (2, (4, 4), 4, {"padding": "same", "padding_mode": "replicate"}),
    "circular same even": (2, (4, 5), (2, 3), {"padding": "same", "padding_mode": "circular"}),
    "circular stride": (2, (5, 5), 3, {"padding": 1, "padding_mode": "circular", "stride": 2}),
    "kernel as large as the map": (3, (4, 3), (4, 3), {}),
    "groups": (4, (4, 4), 3, {"groups": 2, "padding": 1, "stride": 2}),
    "depthwise": (4, (4, 4), 3, {"groups": 4, "padding": 1, "padding_mode": "reflect"}),
    "3d": (2, (3, 4, 3), (2, 3, 1), {"padding": (1, 1, 0), "stride": (1, 2, 1)}),
    "3d groups": (4, (3, 3, 3), 2, {"padding": "same", "groups": 2}),
}
each_case = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[nn.Module, Tensor]:
    channels, shape, kernel, options = CASES[name]
    conv = CONVS[len(shape)](channels, 8, kernel, **options).double()
    return conv, torch.randn(3, channels, *shape, dtype=torch.float64)


def assert_same(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_patches_times_filters_is_the_convolution(name: str) -> None:
    conv, x = case(name)
    geometry = ConvGeometry.of(conv)
    filters = conv.weight.reshape(geometry.groups, 8 // geometry.groups, -1)
    z = torch.einsum("ngsd,gkd->ngks", patches(x, geometry), filters).flatten(1, 2)
    expected = conv(x)
    assert geometry.output_shape(geometry.pad(x).shape[2:]) == tuple(expected.shape[2:])
    assert_same(z + conv.bias[:, None], expected.flatten(2))


@each_case
def test_patch_squared_norm(name: str) -> None:
    conv, x = case(name)
    geometry = ConvGeometry.of(conv)
    assert_same(patch_squared_norm(x, geometry), patches(x, geometry).square().sum(-1))


@each_case
@pytest.mark.parametrize("operations", [(0, 1), (1, 0)], ids=["views", "rows"])
def test_patch_gram(name: str, operations: tuple[int, int]) -> None:
    conv, x = case(name)
    geometry = ConvGeometry.of(conv)._replace(groups=1)
    rows = patches(x, geometry).squeeze(1)
    with mock.patch.object(MODULE, "_patch_gram_operations", return_value=operations):
        assert_same(patch_gram(x, geometry), rows @ rows.mT)


@pytest.mark.parametrize(("stride", "way"), [(1, "views"), (4, "rows")])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_patch_gram_takes_the_cheaper_way(stride: int, way: str, mode: str) -> None:
    conv = nn.Conv2d(64, 2, 3, stride=stride, padding=1, padding_mode=mode)
    x, geometry = torch.randn(2, 64, 8, 8, dtype=torch.float64), ConvGeometry.of(conv)
    rows = patches(x, geometry).squeeze(1)
    with mock.patch.object(MODULE, "patches", wraps=patches) as unfold:
        assert_same(patch_gram(x, geometry), rows @ rows.mT)
    assert unfold.called == (way == "rows")


@each_case
@pytest.mark.parametrize("gram_pays", [True, False], ids=["gram", "rows"])
def test_gram_factors(name: str, gram_pays: bool) -> None:
    """Against autograd, where `a_k` is the gradient of `sum_s M_ks z_ks` in the filter, padded to all groups."""
    conv, x = case(name)
    positions = conv(x).flatten(2).shape[2]
    jacobian = torch.randn(3, 8, positions, dtype=torch.float64)
    rows = torch.stack(
        [
            torch.autograd.grad((conv(x[[i]]).flatten(2) * jacobian[i]).sum(), conv.weight)[0].flatten(1)
            for i in range(3)
        ]
    )
    geometry = ConvGeometry.of(conv)
    with mock.patch.object(MODULE, "_gram_pays", return_value=gram_pays and geometry.groups == 1):
        left, right = gram_factors(x, jacobian, geometry)
    assert_same(left @ right.mT, rows @ rows.mT)


@pytest.mark.parametrize(("way", "channels", "filters", "side"), [("rows", 1, 4, 9), ("gram", 64, 64, 3)])
def test_gram_factors_take_the_cheaper_way(way: str, channels: int, filters: int, side: int) -> None:
    x = torch.randn(2, channels, side, side, dtype=torch.float64)
    jacobian = torch.randn(2, filters, side**2, dtype=torch.float64)
    geometry = ConvGeometry.of(nn.Conv2d(channels, filters, 3, padding=1))
    rows = jacobian @ patches(x, geometry).squeeze(1)
    with mock.patch.object(MODULE, "patch_gram", wraps=patch_gram) as gram:
        left, right = gram_factors(x, jacobian, geometry)
    assert_same(left @ right.mT, rows @ rows.mT)
    assert gram.called == (way == "gram")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize(
    ("stride", "padding", "mode"), [(1, 1, "zeros"), (2, "valid", "zeros"), (1, "same", "circular")]
)
def test_rows_by_a_convolution_are_those_by_products(stride: int, padding: int | str, mode: str) -> None:
    conv = nn.Conv2d(3, 4, (4, 3), stride, padding, dilation=(1, 2), padding_mode=mode)
    x = torch.randn(2, 3, 34, 33)
    jacobian, geometry = torch.randn(2, 4, conv(x).flatten(2).shape[2]), ConvGeometry.of(conv)
    expected, _ = gram_factors(x.double(), jacobian.double(), geometry)
    with mock.patch.object(MODULE, "conv2d_weight", wraps=MODULE.conv2d_weight) as convolved:
        left, right = gram_factors(x, jacobian, geometry)
    assert convolved.called
    assert left is right
    torch.testing.assert_close(left.double(), expected, rtol=1e-4, atol=1e-3)
