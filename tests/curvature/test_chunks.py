"""What the user chose counts on every device."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.curvature.chunks import chunk_bytes_on


@pytest.mark.parametrize(
    ("device", "chosen", "expected"), [("cpu", None, 2**24), ("cuda", None, 2**29), ("cpu", 7, 7), ("cuda", 7, 7)]
)
def test_bytes_at_once(device: str, chosen: int | None, expected: int) -> None:
    assert chunk_bytes_on(torch.device(device), chosen) == expected
    assert chunk_bytes_on(torch.device(device), chosen, on_cpu=9) == (9 if expected == 2**24 else expected)
