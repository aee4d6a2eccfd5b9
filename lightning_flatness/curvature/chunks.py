"""How much memory temporary tensors may take at once."""

from __future__ import annotations

import torch

_CPU_BYTES = 16 * 2**20  # larger groups of samples leave the processor's caches
_CUDA_BYTES = 512 * 2**20  # where every group costs the host the same time, whatever its size


def chunk_bytes_on(device: torch.device, chosen: int | None, on_cpu: int = _CPU_BYTES) -> int:
    """Return what temporary tensors may take at once on a device; a single sample may take more.

    Args:
        device: where the tensors are.
        chosen: what the user chose, in bytes; None: 512 MiB on a CUDA device, else `on_cpu`.
        on_cpu: what is best on other devices.

    Example:
        >>> import torch
        >>> chunk_bytes_on(torch.device("cpu"), None) // 2**20
        16
    """
    if chosen is not None:
        return chosen
    return _CUDA_BYTES if device.type == "cuda" else on_cpu
