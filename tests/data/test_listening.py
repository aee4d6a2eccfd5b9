from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_flatness.data.listening import LoggedValues


@pytest.mark.parametrize("is_own", [True, False])
def test_tensors_are_heard_while_it_listens_and_the_log_is_called(
    is_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(LightningModule, "log", lambda self, name, value, **_: heard.append(name))
    module = LightningModule()
    if is_own:
        module.log = lambda name, value, **_: heard.append(name)
    before, listener = module.__dict__.get("log"), LoggedValues(module)
    module.log("early", torch.ones(()))
    for _ in range(2):  # starting again forgets what was heard
        listener.start()
        module.log("loss", torch.ones(()), prog_bar=True)
        module.log("number", 1.0)
    listener.stop()
    listener.stop()
    module.log("late", torch.ones(()))
    assert [name for name, _ in listener.values] == ["loss"]
    assert heard == ["early", "loss", "number", "loss", "number", "late"]
    assert module.__dict__.get("log") is before
