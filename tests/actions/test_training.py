from __future__ import annotations

import json
import queue
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from lightning_flatness.actions.learning_rate import cut_learning_rate
from lightning_flatness.actions.training import Notify, ReduceLR, StopTraining, escalation
from lightning_flatness.rules.alert import Action, ActionError, Alert

ALERT = Alert("rule", "flatness/relative", 2.3, 1.0, 8, 1, "flatness/relative rose from 1 to 2.3.")
BATCHES = 4


class Line(LightningModule):
    """One weight; an epoch has four batches."""

    def __init__(self, schedule: Callable[[Optimizer], Any] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.schedule = schedule

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("constant", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = SGD([{"params": self.layer.weight, "lr": 0.1}, {"params": self.layer.bias, "lr": 0.02}])
        return [optimizer], [self.schedule(optimizer)] if self.schedule else []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(BATCHES, 1))

    val_dataloader = train_dataloader


class TwoOptimizers(Line):
    """Optimised by hand; the first optimizer's scheduler is stepped by hand too."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).square().mean())
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizers = [SGD([self.layer.weight], lr=0.1), SGD([self.layer.bias], lr=0.02)]
        return optimizers, [CosineAnnealingLR(optimizers[0], T_max=9)]


class Act(Callback):
    """Applies actions at the end of the validations of given numbers, counted without the sanity check."""

    def __init__(self, actions: dict[int, Action], sanity: Action | None = None) -> None:
        self.actions, self.sanity = actions, sanity
        self.number, self.said, self.rates = 0, [], []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates += [[float(g["lr"]) for optimizer in trainer.optimizers for g in optimizer.param_groups]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        action = self.sanity if trainer.sanity_checking else self.actions.get(self.number)
        self.number += not trainer.sanity_checking
        if action:
            self.said.append(action.apply(ALERT, trainer, pl_module))


def fitted(
    model: LightningModule, act: Act, *callbacks: Callback, ckpt_path: str | None = None, **kwargs: Any
) -> Trainer:
    settings = {"max_epochs": 5, "accelerator": "cpu", "num_sanity_val_steps": 0, "logger": False} | kwargs
    trainer = Trainer(
        **settings,
        callbacks=[act, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def each_step(scheduler: LRScheduler) -> dict[str, Any]:
    return {"scheduler": scheduler, "interval": "step"}


SCHEDULES: dict[str, Callable[[Optimizer], Any] | None] = {
    "none": None,
    "step": lambda o: StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=4),
    "cosine floor": lambda o: CosineAnnealingLR(o, T_max=4, eta_min=0.01),
    "one cycle": lambda o: each_step(OneCycleLR(o, [0.1, 0.2], total_steps=20, cycle_momentum=False)),
    "warm": lambda o: each_step(
        SequentialLR(o, [LinearLR(o, 0.1, total_iters=10), CosineAnnealingLR(o, T_max=10)], milestones=[10])
    ),
    "plateau": lambda o: {"scheduler": ReduceLROnPlateau(o, factor=0.5, patience=0), "monitor": "constant"},
}


@pytest.mark.parametrize("model", [*SCHEDULES, "two optimizers"])
def test_the_trainer_goes_on_from_the_cut(model: str) -> None:
    """Cut after the second and the fourth of ten validations, two in each epoch."""

    def rates(actions: dict[int, Action]) -> tuple[torch.Tensor, Act]:
        act, monitor = Act(actions), LearningRateMonitor("step")
        module = TwoOptimizers() if model == "two optimizers" else Line(SCHEDULES[model])
        logger = {} if model == "two optimizers" else {"logger": True, "log_every_n_steps": 1}
        fitted(module, act, *[monitor] * bool(logger), val_check_interval=0.5, **logger)
        got = torch.tensor(act.rates, dtype=torch.float64)
        if logger:
            torch.testing.assert_close(torch.tensor(list(monitor.lrs.values()), dtype=torch.float64).T, got)
        return got, act

    untouched, _ = rates({})
    got, act = rates({1: ReduceLR(0.5), 3: ReduceLR(0.1)})
    cuts = torch.tensor([1.0] * 4 + [0.5] * 4 + [0.05] * 12, dtype=torch.float64)
    torch.testing.assert_close(got, untouched * cuts[:, None])
    assert all(said.startswith("Learning rate cut from ") and " to " in said for said in act.said)


@pytest.mark.parametrize("model", [*SCHEDULES, "two optimizers"])
@pytest.mark.parametrize("options", [{}, {"scale_floors": False, "min_lr": 0.015}], ids=["plain", "floors"])
def test_a_cut_that_is_not_armed_says_what_an_armed_one_does(model: str, options: dict[str, Any]) -> None:
    def fit(actions: dict[int, Action]) -> tuple[Trainer, Act]:
        act = Act(actions)
        return fitted(TwoOptimizers() if model == "two optimizers" else Line(SCHEDULES[model]), act, max_epochs=3), act

    (_, armed), (run, unarmed), (untouched, plain) = (
        fit(actions) for actions in ({1: ReduceLR(0.5, **options)}, {1: ReduceLR(0.5, armed=False, **options)}, {})
    )
    (done,), (said,) = armed.said, unarmed.said
    assert said.replace("Would have cut the learning rate", "Learning rate cut").replace(" (not armed)", "") == done
    assert " to " in said
    assert unarmed.rates == plain.rates != armed.rates
    for one, other in zip(run.lr_scheduler_configs, untouched.lr_scheduler_configs, strict=True):
        assert str(one.scheduler.state_dict()) == str(other.scheduler.state_dict())
    assert str([o.state_dict() for o in run.optimizers]) == str([o.state_dict() for o in untouched.optimizers])


def test_a_stop_that_is_not_armed_never_comes() -> None:
    stop = StopTraining(armed=False)
    trainer = fitted(Line(), act := Act({0: stop}), min_epochs=2, max_epochs=4)
    assert act.said == ["Would have stopped here, not before min_epochs=2 (not armed)."]
    stop.resume(ALERT, trainer)
    assert (trainer.global_step, stop.reason) == (4 * BATCHES, None)


@pytest.mark.parametrize("schedule", ["one cycle", "cosine floor", "warm", "plateau"])
def test_a_resumed_training_goes_on_from_the_cut(schedule: str, tmp_path: Path) -> None:
    """From the checkpoint of the very validation in which the learning rate was cut."""

    def rates_after_resume(actions: dict[int, Action], folder: Path) -> torch.Tensor:
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fitted(Line(SCHEDULES[schedule]), Act(actions), checkpoints)
        resumed = Act({})
        fitted(Line(SCHEDULES[schedule]), resumed, ckpt_path=str(folder / "epoch=1.ckpt"))
        return torch.tensor(resumed.rates, dtype=torch.float64)

    cut, untouched = rates_after_resume({1: ReduceLR(0.5)}, tmp_path / "cut"), rates_after_resume({}, tmp_path / "not")
    assert len(cut) == 3 * BATCHES
    torch.testing.assert_close(cut, 0.5 * untouched)


def test_a_learning_rate_set_by_hand_is_a_warning() -> None:
    class ByHand(Line):
        def on_train_batch_start(self, *_: Any) -> None:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.1 * 0.99**self.global_step

    with pytest.warns(UserWarning, match="cut from .* to .*, it was set to .* in the next change") as caught:
        fitted(ByHand(), Act({1: ReduceLR(0.1)}))
    assert sum("cut of the learning rate" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("at", [1, 3])
def test_a_cut_that_weight_averaging_overrides_is_a_warning(at: int) -> None:
    """Its scheduler takes over in the third epoch; one that is there when the rate is cut is cut too."""
    model, averaging = Line(SCHEDULES["cosine"]), StochasticWeightAveraging(0.05, swa_epoch_start=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(model, Act({at: ReduceLR(0.1)}), averaging)
    assert sum("SWALR has taken over" in str(each.message) for each in caught) == (at == 1)


def test_a_cut_is_watched_after_a_resume(tmp_path: Path) -> None:
    class Milestone(Line):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 3:
                self.trainer.optimizers[0].param_groups[0]["lr"] = 0.02

    class Resume(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            ReduceLR(0.1).resume(ALERT, trainer)

    fitted(Line(), Act({1: ReduceLR(0.1)}), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    with pytest.warns(UserWarning, match="cut of the learning rate") as caught:
        fitted(Milestone(), Act({}), Resume(), ckpt_path=str(tmp_path / "epoch=2.ckpt"))
    assert sum("cut of the learning rate" in str(each.message) for each in caught) == 1


class WithoutARate(SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> None: ...


@pytest.mark.parametrize("first", [True, False])
def test_an_optimizer_without_a_rate_is_left_alone(first: bool) -> None:
    class Mixed(TwoOptimizers):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [WithoutARate([self.layer.weight]), SGD([self.layer.bias], lr=0.02)][:: 1 if first else -1]

    class Rates(Act):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.rates += [[group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]]

    fitted(Mixed(), act := Rates({0: ReduceLR(0.1)}), max_epochs=2)
    assert act.rates[-1] == ([None, 0.002] if first else [0.002, None])
    number = 0 if first else 1
    assert act.said == [
        f"Learning rate cut from 0.02 to 0.002. Without a learning rate to cut: optimizer {number} (WithoutARate)."
    ]


def test_an_action_that_fails_half_way_says_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Catch(Act):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with pytest.raises(ActionError, match=r"optimizer 0 \(SGD\) was not cut, or in part: .*fault") as caught:
                super().on_validation_end(trainer, pl_module)
            assert str(caught.value).endswith("Learning rate cut from 0.02 to 0.002.")

    def fail(optimizer: Optimizer, *args: Any) -> None:
        if optimizer.param_groups[0]["lr"] == 0.1:
            raise RuntimeError("fault")
        cut_learning_rate(optimizer, *args)

    monkeypatch.setattr("lightning_flatness.actions.training.cut_learning_rate", fail)
    module = TwoOptimizers()
    module.configure_optimizers = lambda: [
        SGD([p], lr=lr) for p, lr in zip(module.parameters(), (0.1, 0.02), strict=True)
    ]
    module.lr_schedulers = lambda: SimpleNamespace(step=lambda: None)
    trainer = fitted(module, Catch({0: ReduceLR(0.1)}), max_epochs=1)
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [0.1, 0.002]


def test_min_lr_is_said() -> None:
    act = Act({0: ReduceLR(0.5, min_lr=0.015), 1: ReduceLR(0.01, min_lr=0.015), 2: ReduceLR(0.5, min_lr=0.015)})
    fitted(Line(), act)
    assert act.said == [
        "Learning rate cut from 0.1 to 0.05 and from 0.02 to 0.015.",
        "Learning rate cut from 0.05 to 0.015.",
        "Learning rate left as it is: it cannot be cut (min_lr=0.015).",
    ]


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({}, BATCHES, "Training stops."),
        ({"val_check_interval": 2}, 2, "Training stops."),
        ({"min_epochs": 3}, 3 * BATCHES, "Training stops, not before min_epochs=3."),
        ({"min_steps": 6, "val_check_interval": 2}, 6, "Training stops, not before min_epochs=1 and min_steps=6."),
        ({"min_epochs": 2, "min_steps": 9}, 9, "Training stops, not before min_epochs=2 and min_steps=9."),
    ],
)
def test_stopping(settings: dict[str, Any], steps: int, said: str) -> None:
    stop = StopTraining()
    act = Act({0: stop})
    trainer = fitted(Line(), act, **settings)
    assert trainer.global_step == steps
    assert trainer.should_stop
    assert (stop.reason, act.said) == (ALERT.reason, [said])


@pytest.mark.parametrize("action", [StopTraining(), ReduceLR(0.1), Notify(lambda alert: pytest.fail("notified"))])
def test_nothing_is_done_where_nothing_is_trained(action: Action) -> None:
    act = Act({}, sanity=action)
    trainer = fitted(Line(), act, num_sanity_val_steps=2, max_epochs=2)
    assert trainer.global_step == 2 * BATCHES
    assert act.rates == [[0.1, 0.02]] * 2 * BATCHES
    act.actions = {act.number: action}
    trainer.validate(Line(), verbose=False)
    assert act.said == [f"{type(action).__name__} did nothing: the Trainer is not training."] * 2
    with pytest.raises(ValueError, match="needs a Trainer to act on; got None"):
        action.apply(ALERT, None, None)


def test_a_failing_notification_is_one_warning() -> None:
    def mail(alert: Alert) -> None:
        raise ConnectionError("no network")

    action = Notify(mail)
    with pytest.warns(UserWarning, match=r"mail raised ConnectionError\('no network'\)") as caught:
        trainer = fitted(Line(), act := Act(dict.fromkeys(range(5), action)))
    assert len([each for each in caught if "Notify" in str(each.message)]) == 1
    assert trainer.global_step == 5 * BATCHES
    assert act.said == ["Not notified: mail failed."] * 5


def test_a_notification_holds_the_alert() -> None:
    received: list[Alert] = []
    fitted(Line(), act := Act({1: Notify(received.append)}))
    assert received == [ALERT]
    assert act.said == ["Notified: append."]


class Server(ThreadingHTTPServer):
    """A webhook on this machine; it answers when it is told to."""

    def __init__(self) -> None:
        server, self.received, self.answer = self, queue.Queue[bytes](), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.received.put(self.rfile.read(int(self.headers["Content-Length"])))
                server.answer.wait(60)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def webhook(monkeypatch: pytest.MonkeyPatch, url: str) -> dict[str, Any]:
    """Run the code of the documentation; the threads that are to be joined at exit are in `joined`."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "alerts.md"
    (code,) = (
        part for part in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S) if "urllib" in part
    )
    monkeypatch.setenv("ALERT_WEBHOOK", url)
    joined: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda join, *limits: joined.append((join, limits)))
    namespace: dict[str, Any] = {"joined": joined}
    exec(code, namespace)
    return namespace


def test_the_webhook_of_the_documentation_sends_and_does_not_stall_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The training ends while the server has not answered any request."""
    with Server() as server:
        code = webhook(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        others = Alert("divergence", "k", 1.0, 2.0, 9, 1, "k fell."), Alert("mine", "k", 1.0, 2.0, 9, 1, "k rose.")
        monkeypatch.setattr(sys.modules[__name__], "ALERT", replace(ALERT, others=others))
        trainer = fitted(Line(), act := Act({1: Notify(code["send"])}))
        assert (trainer.global_step, act.said) == (5 * BATCHES, ["Notified: send."])
        message = json.loads(server.received.get(timeout=30))
        assert message["step"] == ALERT.step
        assert message["text"].startswith("rule and divergence and mine, warning\nrule: warning at step 8, epoch 1\n")
        assert "same event: divergence at step 9. k fell." in message["text"]
        ((join, limits),) = code["joined"]
        assert limits == (10,)  # seconds
        assert join.__self__.daemon
        server.answer.set()
        join(30)
        server.shutdown()


def test_a_webhook_that_is_not_there_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.shutdown()
    server.server_close()
    code = webhook(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    code["send"](ALERT)
    for join, _ in code["joined"]:
        join(30)
    assert "The alert could not be sent" in caplog.text


def test_escalation() -> None:
    actions = [ReduceLR(), Notify(print), StopTraining()]
    assert [actions.index(escalation(actions, number)) for number in range(1, 6)] == [0, 1, 2, 2, 2]
    assert escalation(actions[0], 7) is actions[0]
    assert escalation([], 1) is escalation(None, 1) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReduceLR(factor=1.0), "`factor` must lie between 0 and 1, both excluded; got 1.0"),
        (lambda: ReduceLR(factor=0.0), "got 0.0"),
        (lambda: ReduceLR(factor=float("nan")), "got nan"),
        (lambda: ReduceLR(min_lr=-1e-6), "`min_lr` must be at least 0; got -1e-06"),
        (lambda: Notify("print"), "`function` must be callable with an alert; got 'print'"),
    ],
)
def test_wrong_arguments(make: Callable[[], Action], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def write_to_a_file(alert: Alert) -> None:
    with Path("alerts.txt").open("a") as file:
        file.write(f"{alert.reason}\n")


class WriteSteps(Callback):
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        Path(f"rank{trainer.global_rank}.txt").write_text(f"{trainer.global_step} {rates}")


@pytest.mark.timeout(60)
def test_two_processes_act_alike() -> None:
    act = Act({0: ReduceLR(0.5), 1: Notify(write_to_a_file), 2: StopTraining()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        fitted(Line(), act, WriteSteps(), strategy="ddp_fork", devices=2)
    assert Path("alerts.txt").read_text() == f"{ALERT.reason}\n"
    assert Path("rank0.txt").read_text() == Path("rank1.txt").read_text() == f"{3 * BATCHES // 2} [0.05, 0.01]"


def test_actions_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--action", type=Action | list[Action] | None)
    text = """
    - class_path: lightning_flatness.actions.ReduceLR
      init_args: {factor: 0.5, min_lr: 1.0e-06}
    - class_path: lightning_flatness.actions.Notify
      init_args: {function: builtins.print}
    - lightning_flatness.actions.StopTraining
    """
    config = parser.parse_args(["--action", text])
    again = parser.parse_string(parser.dump(config))
    for each in (config, again):
        cut, notify, stop = parser.instantiate_classes(each).action
        assert (cut.factor, cut.min_lr, cut.scale_floors, notify.function) == (0.5, 1e-6, True, print)
        assert isinstance(stop, StopTraining)
