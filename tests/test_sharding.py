"""Weights of which every process holds a part (FSDP2)."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SUPPORTED
from torch import nn

from lightning_flatness import measure

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="this torch has no FSDP2"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
]
CASE = next(case for case in SUPPORTED if case.name == "relu")


def measured(model: nn.Module, method: Any = "pooled") -> str:
    try:
        return f"{measure(model, [CASE.data()], method=method).relative_flatness:.12g}"
    except ValueError as error:
        return str(error)


SHARDED: dict[str, tuple[tuple[str, ...], bool]] = {  # modules, each sharded on its own; whether it is measured
    "nothing": ((), True),
    "the network": (("",), True),  # whole while it runs
    "the stem": (("stem",), True),
    "the convolution": (("conv",), True),  # the outermost one stays whole after its pass
    "the classifier": (("head",), True),
    "each layer": (("stem", "conv", "head", ""), False),  # the inner ones are in parts again when their output is there
}


def process(rank: int, names: tuple[str, ...], folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    try:
        model = CASE.model().eval()
        for name in names:
            fsdp.fully_shard(model.get_submodule(name))
        Path(folder, f"{rank}.json").write_text(json.dumps([measured(model), measured(model, "auto")]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("names", "whole"), SHARDED.values(), ids=SHARDED)
def test_measured_where_the_weights_are_whole_else_refused_by_all(
    tmp_path: Path, names: tuple[str, ...], whole: bool
) -> None:
    mp.start_processes(process, (names, str(tmp_path)), nprocs=2, start_method="fork")
    (first, chosen), second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert [first, chosen] == second
    assert chosen == measured(CASE.model().eval(), "auto" if whole else "classifier")
    if whole:
        assert first == chosen
    else:
        assert "must be whole on every process" in first
        assert "is sharded" in first
