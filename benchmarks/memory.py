"""Validates once, with or without the monitor, and prints the peak resident memory in MB as the last line.

Run in a process of its own: `python benchmarks/memory.py NETWORK MONITORED`.
"""

from __future__ import annotations

import sys

import torch
from timing import own_peak_megabytes
from validation import SETTINGS, validation

if __name__ == "__main__":
    name, monitored = sys.argv[1], sys.argv[2] == "1"
    torch.set_num_threads(2)
    validation(SETTINGS[name], monitored)()
    print(own_peak_megabytes())
