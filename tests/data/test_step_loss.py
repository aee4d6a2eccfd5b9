"""Where the loss of a step comes from; `tests/test_callback.py` has whole validations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import Network
from torch import Tensor

from lightning_flatness import ForwardRecorder, UnsupportedTailError
from lightning_flatness.data.step_loss import step_loss

X, Y = torch.ones(2, 2, 5, 5), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("outputs", "logged", "batch", "given", "words", "is_assumed"),
    [
        ("loss", [], (X, Y), None, "returned by validation_step", False),
        ({"loss": "loss", "x": 1}, [("val", "other")], (X, Y), None, "returned by validation_step", False),
        (None, [("val", "loss"), ("n", 1)], (X, Y), None, "logged by validation_step as val", False),
        (None, [("a", "loss"), ("b", "loss")], (X, Y), None, "logged by validation_step as a and b", False),
        (None, [("a", "loss"), ("b", "other")], (X, Y), None, "a.*b", None),
        (None, [], (X, Y), None, "cross", True),
        ("other", [], (X, Y), lambda output, y: F.cross_entropy(output, y), "", False),
        (None, [], (X[:0], Y[:0]), None, "", False),
    ],
)
def test_the_loss_of_a_step(
    outputs: Any, logged: Any, batch: Any, given: Any, words: str, is_assumed: bool | None
) -> None:
    network = Network().eval()
    with ForwardRecorder(network) as recorder, torch.no_grad():
        output = network(X)
        known = {"loss": F.cross_entropy(output, Y), "other": output.square().mean(), 1: torch.tensor(1.0), None: None}

        def value(item: Any) -> Any:
            return {k: value(v) for k, v in item.items()} if isinstance(item, dict) else known[item]

        arguments = recorder, value(outputs), [(name, value(item)) for name, item in logged], batch, None, given
        if is_assumed is None:
            with pytest.raises(UnsupportedTailError, match=words):
                step_loss(*arguments)
            return
        found = step_loss(*arguments)
    assert words in found.words
    assert found.is_assumed == is_assumed
    assert isinstance(found.value, Tensor) == (len(batch[0]) > 0)
    if found.value is not None:
        torch.testing.assert_close(found.value, known["loss"])
