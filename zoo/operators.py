"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch: import this first.

Its compiled operators cannot be loaded there, and its Python part only asks that these two are declared.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
