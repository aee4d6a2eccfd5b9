"""What is shown, when; and that a training with pictures is the training without."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning_runs import Broken, Classifier, everything, trainer

from lightning_flatness import FlatnessMonitor, ReduceLR, Rule, StopTraining
from lightning_flatness.reporting import display


class Gallery(TensorBoardLogger):
    """Notes the steps of the pictures."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="")
        self.steps: list[int] = []

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_image = lambda tag, picture, step, **_: self.steps.append(step)
        return writer


def pictures(tmp_path: Path, *, rule: Rule | None = None, every: int | None = None, epochs: int = 5) -> list[int]:
    logger = Gallery(tmp_path)
    monitor = FlatnessMonitor(rules=[rule] if rule else [], figure_every_n_validations=every)
    trainer(tmp_path, monitor, logger=logger, max_epochs=epochs).fit(Classifier())
    return [(step + 1) // 6 for step in logger.steps]


def test_the_figure_comes_every_n_validations_at_alerts_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Rule("flatness/trace", above=-1.0, warmup=2, cooldown=9)
    assert pictures(tmp_path, every=2) == [2, 4, 5]
    assert pictures(tmp_path, every=2, rule=rule) == [2, 3, 4, 5]
    assert pictures(tmp_path, every=5) == [5]  # not twice
    assert pictures(tmp_path, every=0, rule=rule) == []
    assert pictures(tmp_path) == [5]  # a short training has no time for more
    monkeypatch.setattr(display, "_SHARE", 1e9)
    assert pictures(tmp_path, epochs=3) == [1, 2, 3]
    with pytest.raises(ValueError, match="figure_every_n_validations"):
        FlatnessMonitor(figure_every_n_validations=-1)


def test_nothing_happens_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pictures(tmp_path, every=1) == []
    monitor = FlatnessMonitor()
    with warnings.catch_warnings(record=True) as caught:
        trainer(tmp_path, monitor, logger=CSVLogger(tmp_path)).fit(Classifier())
    assert not [each for each in caught if "matplotlib" in str(each.message)]
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[plots\]"):
        monitor.figure()


def test_the_figure_names_rules_actions_and_what_is_measured(tmp_path: Path) -> None:
    escalating = [ReduceLR(0.5), StopTraining()]
    monitor = FlatnessMonitor(rules=[Rule("flatness/trace", above=-1.0, name="always", action=escalating)])
    trainer(tmp_path, monitor, max_epochs=4).fit(Classifier())
    figure = monitor.figure()
    texts = [text.get_text() for text in figure.axes[0].texts[1:]]
    assert texts == ["always", "lr / 2", "always", "stopped"]
    footer = "layer net.conv2 · method pooled · loss logged by validation_step as val_loss · 10 samples"
    assert figure.texts[0].get_text() == footer
    assert monitor.figure(dark=True).get_facecolor() != figure.get_facecolor()
    with pytest.raises(ValueError, match="at least one validation"):
        FlatnessMonitor().figure()


def test_a_figure_that_fails_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(display, "dashboard", fail)
    with pytest.warns(UserWarning, match="dashboard could not be drawn: RuntimeError") as caught:
        pictures(tmp_path, every=1)
    assert len([each for each in caught if "no font" in str(each.message)]) == 1


def test_an_exception_in_training_draws_nothing(tmp_path: Path) -> None:
    logger = Gallery(tmp_path)
    run = trainer(tmp_path, FlatnessMonitor(), Broken("on_train_epoch_end", KeyError("x")), logger=logger)
    with pytest.raises(KeyError):
        run.fit(Classifier())
    assert logger.steps == []


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger, WandbLogger])
def test_training_with_pictures_is_bit_equal(tmp_path: Path, kind: type[Logger]) -> None:
    def run_with(*monitors: FlatnessMonitor) -> list[Any]:
        extra: dict[str, Any] = {"offline": True} if kind is WandbLogger else {}
        module = Classifier()
        run = trainer(tmp_path, *monitors, logger=kind(save_dir=tmp_path, **extra), max_epochs=2)
        np.random.seed(0)
        run.fit(module)
        if kind is WandbLogger:
            run.logger.experiment.finish()
        return everything(module, run)

    rule = Rule("flatness/trace", above=-1.0)
    watched = FlatnessMonitor(rules=[rule], figure_every_n_validations=1, prog_bar=True)
    assert run_with(watched) == run_with()
