from __future__ import annotations

from typing import Any

import pytest
from lightning_runs import Classifier, hooks, trainer

from lightning_flatness import FlatnessMonitor

optuna = pytest.importorskip("optuna")
KEY = "flatness/relative"


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "pruning first"])
def test_pruning_by_flatness(tmp_path: Any, first: bool) -> None:
    integration = pytest.importorskip("optuna_integration")
    module = Classifier()

    def objective(trial: Any) -> float:
        callbacks = [FlatnessMonitor(strict=True), integration.PyTorchLightningPruningCallback(trial, monitor=KEY)]
        run = trainer(tmp_path, *(callbacks if first else callbacks[::-1]), max_epochs=9)
        run.fit(module)
        return float(run.callback_metrics[KEY])

    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.0, n_warmup_steps=2))
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 1, 2]  # not in the sanity check
    assert len(set(trial.intermediate_values.values())) == 3
    assert hooks(module) == 0


def test_flatness_as_an_objective(tmp_path: Any) -> None:
    def objective(trial: Any) -> float:
        module = Classifier()
        module.net.drop.p = trial.suggest_float("dropout", 0.0, 0.9)
        run = trainer(tmp_path, FlatnessMonitor())
        run.fit(module)
        return float(run.callback_metrics[KEY])

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="minimize")
    study.optimize(objective, n_trials=3)
    values = [trial.value for trial in study.trials]
    assert study.best_value == min(values) < max(values)
