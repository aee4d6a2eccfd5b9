from __future__ import annotations

import math
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import Classifier, Values, trainer

from lightning_flatness import FlatnessMonitor
from lightning_flatness.reporting.history import History


def test_gaps_are_nan_and_the_state_is_plain() -> None:
    history, copy = History(), History()
    history.add(1, 0, {"a": 1.0})
    history.add(3, 1, {"b": 2.0})
    copy.load_state_dict(history.state_dict())
    for each in (history, copy):
        assert (len(each), each.steps, each.epochs) == (2, [1, 3], [0, 1])
        assert str(each.values) == "{'a': [1.0, nan], 'b': [nan, 2.0]}"
    copy.add(5, 2, {"a": 0.0})
    assert len(history.values["a"]) == 2


def test_to_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History()
    history.add(1, 0, {"a": 1.0})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
            history.to_pandas()
    pytest.importorskip("pandas")
    frame = history.to_pandas()
    assert frame.reset_index().to_dict("list") == {"step": [1], "epoch": [0], "a": [1.0]}


def test_it_has_every_validation_of_a_training_and_goes_on_from_a_checkpoint(tmp_path: pytest.TempPathFactory) -> None:
    monitor, values = FlatnessMonitor(), Values()
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    run = trainer(tmp_path, monitor, values, save, max_epochs=3, enable_checkpointing=True)
    run.fit(Classifier())
    traces = [value for _, is_sanity, value in values.seen if not is_sanity]
    assert monitor.history.values["flatness/trace"] == traces
    assert (monitor.history.steps, monitor.history.epochs) == ([5, 11, 17], [0, 1, 2])
    assert all(map(math.isfinite, monitor.history.values["val_loss"]))
    run.validate(Classifier(), verbose=False)
    assert len(monitor.history) == 3

    again = FlatnessMonitor()
    torch.manual_seed(0)
    resumed = trainer(tmp_path, again, max_epochs=3)
    resumed.fit(Classifier(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert again.history.steps == [5, 11, 17]
    assert again.history.values["flatness/trace"][:2] == traces[:2]
