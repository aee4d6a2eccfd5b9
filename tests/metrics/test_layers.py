"""The values of several layers over batches and processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import CASES, measured
from torch import Tensor

from lightning_flatness import ForwardRecorder, LayerQuantities, LayersRecorder, UnsupportedTailError
from lightning_flatness.keys import RELATIVE, TRACE, layer_key
from lightning_flatness.metrics.evaluation import Evaluation
from lightning_flatness.metrics.layers import LayerEvaluation, LayerExchange, evaluation_of

CASE = next(case for case in CASES if case.name == "attention")
close = {"rtol": 1e-12, "atol": 0}


def batches() -> tuple[LayerQuantities, list[LayerQuantities]]:
    """All samples at once, and in two batches."""
    model, (x, y) = CASE.model(), CASE.data()
    parts = zip(x.split([2, len(x) - 2]), y.split([2, len(x) - 2]), strict=True)
    return measured(model, x, y), [measured(model, *part) for part in parts]


def evaluated(parts: list[LayerQuantities], layers: list[str] | None = None) -> LayerEvaluation:
    names = list(parts[0].by_layer) if layers is None else layers
    evaluation = LayerEvaluation(torch.device("cpu"), names, is_whole=True, is_shared=False)
    for part in parts:
        evaluation.update(part)
    return evaluation


def test_means_of_each_layer_and_of_the_network() -> None:
    whole, parts = batches()
    values = evaluated(parts).compute()
    expected: dict[str, Tensor] = {layer_key(TRACE, None, whole.network_curvature): whole.network}
    for layer, own in whole.by_layer.items():
        expected[layer_key(RELATIVE, layer, own.curvature)] = own.relative_flatness
        expected[layer_key(TRACE, layer, own.curvature)] = own.hessian_trace
    assert {key for key in values if key.count("/") > 1} == set(expected)
    assert {key.endswith("/ggn") for key in expected} == {True, False}
    for key, samples in expected.items():
        torch.testing.assert_close(values[key].double(), samples.mean(), **close)
    first = next(iter(whole.by_layer.values()))
    torch.testing.assert_close(values["flatness/confidence"].double(), first.confidence.mean(), **close)
    torch.testing.assert_close(values["margin/mean"].double(), first.output_margin.mean(), **close)


def test_what_a_batch_lacks_has_no_mean() -> None:
    _, (first, second) = batches()
    layer = next(iter(second.by_layer))
    without = replace(second, by_layer={n: own for n, own in second.by_layer.items() if n != layer}, left_out=("a",))
    evaluation = evaluated([first, without])
    assert set(evaluation.by_part()) == set(first.by_layer) - {layer}
    assert evaluation.left_out == ("a",)
    with pytest.raises(UnsupportedTailError, match=r"no layer does.*\['a'\]"):
        evaluation.update(replace(without, by_layer={}))


def test_one_batch_of_the_gauss_newton_part_makes_the_mean_one() -> None:
    _, (first, second) = batches()
    layer = next(name for name, curvature in first.curvature.items() if curvature == "ggn")
    exact = {name: replace(own, curvature="hessian") for name, own in first.by_layer.items()}
    assert evaluated([replace(first, by_layer=exact), second]).by_part()[layer][1] == "ggn"


def sums(*evaluations: LayerEvaluation) -> list[int]:
    return [sum(numbers) for numbers in zip(*(each.numbers() for each in evaluations), strict=True)]


def test_processes_agree_on_what_all_have() -> None:
    _, (first, second) = batches()
    layer = next(name for name, curvature in first.curvature.items() if curvature == "hessian")
    layers = list(first.by_layer)
    own, idle = evaluated([first], layers), evaluated([], layers)
    own.agree(sums(own, idle))
    assert set(own.by_part()) == {*first.by_layer, None}
    curved = {name: replace(each, curvature="ggn") for name, each in second.by_layer.items()}
    other = evaluated([replace(second, by_layer=curved, left_out=("a",))])
    own.agree(sums(own, other))
    assert None not in own.by_part()
    assert own.by_part()[layer][1] == "ggn"
    lacking = evaluated([replace(second, by_layer={layer: second.by_layer[layer]})], layers)
    own.agree(sums(own, lacking))
    assert set(own.by_part()) == {layer, None}


def test_a_process_without_evaluations_exchanges_as_many_numbers() -> None:
    model, (_, (first, second)) = CASE.model(), batches()
    recorder, device = LayersRecorder(model), torch.device("cpu")
    exchange = LayerExchange(recorder, 2)
    own = [evaluation_of(recorder, device, is_shared=False) for _ in range(2)]
    for evaluation, part in zip(own, (first, second), strict=True):
        evaluation.update(part)
    before = [evaluation.compute() for evaluation in own]
    numbers, none = exchange.numbers(own), exchange.numbers([])
    assert len(numbers) == len(none)
    exchange.agree(own, [sum(each) for each in zip(numbers, none, strict=True)])
    assert [evaluation.compute() for evaluation in own] == before
    plain = evaluation_of(ForwardRecorder(model), device)
    assert (type(plain), LayerExchange(ForwardRecorder(model), 2).numbers([plain])) == (Evaluation, [])
