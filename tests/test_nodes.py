"""The example of the documentation for several nodes, on two that are one machine."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from lightning_flatness import measure

pytest.importorskip("sklearn")
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "several_nodes.py"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.timeout(180)
def test_two_nodes_measure_what_one_process_does(tmp_path: Path) -> None:
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLE), "2"],
            cwd=tmp_path,
            env=environment | {"NODE_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, second = (node.communicate(timeout=150)[0] for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], first + second
    assert ("FlatnessMonitor measures" in first, "FlatnessMonitor measures" in second) == (True, False)
    with next(tmp_path.glob("lightning_logs/*/metrics.csv")).open() as file:
        values = [float(row["flatness/relative"]) for row in csv.DictReader(file) if row["flatness/relative"]]
    assert len(values) == 3  # untrained, and after each of two epochs

    L.seed_everything(0)
    data = DigitsDataModule()
    data.setup("validate")
    untrained = measure(DigitsClassifier(), data.val_dataloader())
    assert untrained.n_samples == 597  # two processes have 299 each, one of them twice
    assert values[0] == pytest.approx(untrained.relative_flatness, rel=1e-5)
