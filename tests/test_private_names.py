"""What the package uses below the public interface of torch, torchmetrics and Lightning: listed, and there."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torchmetrics.utilities.plot
from lightning.fabric.utilities.distributed import _DatasetSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import SequentialSampler

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Private names")[1]
LISTED = re.findall(r"^\| `(_\w+)` \|", PAGE, re.MULTILINE)
SOURCES = sorted((ROOT / "lightning_flatness").rglob("*.py"))
OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
STEPS = lr_scheduler.ConstantLR(OPTIMIZER), lr_scheduler.ConstantLR(OPTIMIZER)


def compiled() -> Any:
    return torch.compile(nn.Linear(1, 1))


def checkpointed() -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(nn.Linear(1, 1))


def sharded() -> Any:
    from torch.distributed.fsdp import _common_utils

    return {_common_utils.FSDP_WRAPPED_MODULE: None}


def trainer() -> L.Trainer:
    return L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


OWNERS: dict[str, list[Callable[[], Any]]] = {
    "_parameters": [lambda: nn.Linear(1, 1)],
    "_buffers": [lambda: nn.Linear(1, 1)],
    "_non_persistent_buffers_set": [lambda: nn.Linear(1, 1)],
    "_global_forward_hooks": [lambda: torch.nn.modules.module],
    "_global_forward_pre_hooks": [lambda: torch.nn.modules.module],
    "_compiled_call_impl": [lambda: nn.Linear(1, 1)],
    "_call_impl": [lambda: nn.Linear(1, 1)],
    "_dynamo": [lambda: torch],
    "_torchdynamo_orig_callable": [lambda: torch.compile(lambda x: x)],
    "_orig_mod": [compiled],
    "_checkpoint_wrapped_module": [checkpointed],
    "_fsdp_wrapped_module": [sharded],
    "_python_dispatch": [lambda: torch.utils],
    "_get_current_dispatch_mode": [lambda: torch.utils._python_dispatch],
    "_C": [lambda: torch],
    "_current_graph_task_id": [lambda: torch._C],
    "_schema": [lambda: torch.ops.aten.add.Tensor],
    "_version": [lambda: torch.zeros(1)],
    "_last_lr": [lambda: STEPS[0]],
    "_schedulers": [
        lambda: lr_scheduler.SequentialLR(OPTIMIZER, list(STEPS), [3]),
        lambda: lr_scheduler.ChainedScheduler(list(STEPS)),
    ],
    "_milestones": [lambda: lr_scheduler.SequentialLR(OPTIMIZER, list(STEPS), [3])],
    "_plot": [lambda: torchmetrics.Metric],
    "_AX_TYPE": [lambda: torchmetrics.utilities.plot],
    "_PLOT_OUT_TYPE": [lambda: torchmetrics.utilities.plot],
    "_generate_state_key": [L.Callback],
    "_logger_connector": [trainer],
    "_callback_metrics": [lambda: trainer()._logger_connector],
    "_current_fx": [lambda: trainer()._logger_connector],
    "_current_fx_name": [L.LightningModule],
    "_results": [trainer, lambda: trainer().fit_loop.epoch_loop],
    "_is_sequential": [lambda: type(trainer().validate_loop)],
    "_batches_that_stepped": [lambda: trainer().fit_loop.epoch_loop],
    "_save_checkpoint": [ModelCheckpoint],
    "_should_remove_checkpoint": [ModelCheckpoint],
    "_remove_checkpoint": [ModelCheckpoint],
    "_should_check_val_fx": [lambda: trainer().fit_loop.epoch_loop],
    "_data_fetcher": [lambda: trainer().fit_loop],
    "_sampler": [lambda: _DatasetSamplerWrapper(SequentialSampler(range(2)))],
}


@pytest.mark.parametrize("name", LISTED)
def test_each_listed_name_exists(name: str) -> None:
    for owner in OWNERS[name]:
        found = owner()
        assert name in found if isinstance(found, dict) else hasattr(found, name)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(nodes: list[ast.AST]) -> Iterator[str]:
    """Private names of the package's own."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(nodes: list[ast.AST]) -> Iterator[str]:
    """Private attributes and private parts of imports."""
    for node in nodes:
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("lightning_flatness"):
            yield from [*node.module.split("."), *(alias.name for alias in node.names)]


def test_the_sources_use_no_other() -> None:
    assert list(OWNERS) == LISTED
    nodes = [node for source in SOURCES for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))]
    own = {*defined(nodes), "_replace", "_fields"}  # named tuples document the last two, in spite of their names
    others = {name for name in used(nodes) if private(name)} - own
    assert not others - set(LISTED), f"not listed in docs/architecture.md: {sorted(others - set(LISTED))}"
