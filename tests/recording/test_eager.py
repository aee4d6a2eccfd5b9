"""Compiled modules run eagerly as long as somebody needs it, and as before afterwards."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_flatness.recording.eager import EagerStance


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


@pytest.mark.parametrize("users", [1, 3])
@pytest.mark.parametrize("before", ["default", "eager_on_recompile"])
def test_ends_with_its_last_user(before: str, users: int) -> None:
    shared = EagerStance()
    with torch.compiler.set_stance(before):
        for _ in range(2):  # it can be used again
            for _ in range(users):
                shared.enter()
                assert stance() == "force_eager"
            for _ in range(users):
                assert stance() == "force_eager"
                shared.leave()
            assert stance() == before


def test_compiled_functions_keep_their_graphs() -> None:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append("compiled")
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    x, shared = torch.ones(3), EagerStance()
    function(x)
    shared.enter()
    function(x), function(torch.ones(3, 2, dtype=torch.float64))
    shared.leave()
    function(x)
    assert calls == ["compiled"]


@pytest.mark.parametrize("missing", ["compiler", "stance"])
def test_does_nothing_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Before torch 2.6 there is no stance; without a compiled module the compiler is not even imported."""
    before, shared = stance(), EagerStance()
    if missing == "compiler":
        monkeypatch.delitem(sys.modules, "torch._dynamo")
    else:
        monkeypatch.delattr(torch.compiler, "set_stance")
    shared.enter()
    assert stance() == before
    shared.leave()


@pytest.mark.parametrize(("users", "alone"), [(0, False), (1, True), (2, False)])
def test_can_be_lifted_for_its_only_user(users: int, alone: bool) -> None:
    shared = EagerStance()
    for _ in range(users):
        shared.enter()
    before = stance()
    with shared.lifted("fail_on_recompile") as is_alone:
        assert is_alone == alone
        assert stance() == ("fail_on_recompile" if alone else before)
    assert stance() == before
    for _ in range(users):
        shared.leave()
    assert stance() == "default"
