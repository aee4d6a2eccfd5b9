"""What has to be measured in a process of its own; prints the numbers as its last line.

`python benchmarks/alone.py memory NETWORK MONITORED`: peak resident memory of one validation, in MB.
`python benchmarks/alone.py time NETWORK ROUNDS`: time with the monitor / without, the median of the rounds and that of
the shortest times.
"""

from __future__ import annotations

import sys

import torch
from timing import best_ratio, interleaved, own_peak_megabytes, ratio
from validation import SETTINGS, validation

if __name__ == "__main__":
    what, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(2)
    if what == "memory":
        validation(SETTINGS[name], number == 1)()
        print(own_peak_megabytes())
    else:
        runs = {kind: validation(SETTINGS[name], kind == "with") for kind in ("with", "without")}
        times = interleaved(runs, number)
        print(ratio(times["with"], times["without"]), best_ratio(times["with"], times["without"]))
