"""The hooks of a recorder: installed, suspended, and run by hand around what stands for a call of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_flatness.recording.hooks import Hooks, Wanted


def test_hooks_run_around_calls_of_a_module_and_around_what_stands_for_one() -> None:
    heard: list[tuple[Any, ...]] = []

    def listen(hook: str, name: str) -> Any:
        return lambda module, *given: heard.append((hook, name, [type(each).__name__ for each in given]))

    model, x = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)), torch.ones(1, 1, 2, 2)
    conv, linear = model[0], model[2]
    hooks = Hooks(listen)
    hooks.install(
        [Wanted("0", conv, "before_convolution", "after_convolution"), Wanted("2", linear, None, "after_linear")]
    )
    hooks.install([*hooks._wanted, Wanted("", model, "before_network", "after_network")])  # in their place
    assert hooks.layers == [conv, linear]
    model(x)
    expected = [
        ("before_network", "", ["tuple", "dict"]),
        ("before_convolution", "0", ["tuple"]),
        ("after_convolution", "0", ["tuple", "Tensor"]),
        ("after_linear", "2", ["tuple", "dict", "Tensor"]),
        ("after_network", "", ["tuple", "Tensor"]),
    ]
    assert heard == expected
    heard.clear()
    with hooks.suspended():
        model(x)
        assert not heard
        inner = lambda: [hooks.around(layer, (x,), lambda: x) for layer in (conv, model[1], linear)][-1]  # noqa: E731
        assert hooks.around(model, (x,), inner) is x
    assert heard == expected
    hooks.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
