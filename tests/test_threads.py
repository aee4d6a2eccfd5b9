"""Two trainings in two threads of one process, as studies run them: each monitor has its own values."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_runs import Classifier, images, report_of, trainer
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, Rule
from lightning_flatness.precision import full_precision
from lightning_flatness.recording.eager import EAGER

VALIDATIONS = 20


class Values(Callback):
    """The monitor's values, and the weights that they belong to."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, dict[str, Any]]] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            state = {name: value.clone() for name, value in module.state_dict().items()}
            self.rows.append((float(run.callback_metrics["flatness/relative"]), state))


def trial(root: Any, seed: int, gate: threading.Barrier, compiled: bool, results: dict[int, Any]) -> None:
    try:
        module = Classifier()
        with torch.no_grad():
            module.net.head.weight.mul_(1 + seed)
        if compiled:
            module.net.compile(backend="eager")
        loader, values = DataLoader(images(30, seed), batch_size=4), Values()
        monitor = FlatnessMonitor(strict=True, rules=[Rule("flatness/trace", above=0.0)])
        flags: dict[str, Any] = {"val_check_interval": 2, "max_epochs": -(-VALIDATIONS // 3)}  # three in an epoch
        run = trainer(root, monitor, values, num_sanity_val_steps=0, **flags)
        gate.wait()
        run.fit(module, val_dataloaders=loader)
        results[seed] = values.rows[:VALIDATIONS], loader, len(monitor.alerts)
    except BaseException as error:
        results[seed] = error


def two_trials(root: Any, compiled: bool = False) -> dict[int, Any]:
    results: dict[int, Any] = {}
    gate = threading.Barrier(2)
    threads = [threading.Thread(target=trial, args=(root, seed, gate, compiled, results)) for seed in (1, 2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def check(results: dict[int, Any]) -> None:
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
        rows, loader, alerts = result
        assert len(rows) == VALIDATIONS <= alerts
        for value, state in rows:
            module = Classifier()
            module.load_state_dict({name.replace("._orig_mod", ""): tensor for name, tensor in state.items()})
            assert value == pytest.approx(report_of(module, loader)["flatness/relative"], rel=1e-12)


@pytest.fixture
def often_switching() -> Any:
    """Threads take turns ten times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switching")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_threads_have_their_own_values(tmp_path: Any, compiled: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch._dynamo.eval_frame._stance.stance
    check(two_trials(tmp_path, compiled))
    assert (torch.get_float32_matmul_precision(), torch._dynamo.eval_frame._stance.stance) == before
    assert EAGER._users == 0


def test_exact_products_end_with_the_last_thread() -> None:
    part = torch.backends.mkldnn.matmul
    before, entered, leave = part.fp32_precision, threading.Event(), threading.Event()

    def second() -> None:
        with full_precision(torch.device("cpu")):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=second)
    try:
        part.fp32_precision = "bf16"
        with full_precision(torch.device("cpu")):
            thread.start()
            entered.wait()
        assert part.fp32_precision == "ieee"  # of the other thread, which is not done
        leave.set()
        thread.join()
        assert part.fp32_precision == "bf16"
    finally:
        leave.set()
        part.fp32_precision = before
