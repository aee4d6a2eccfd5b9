"""The same numbers on a CUDA device as from the oracle on the CPU, and nothing that holds the device up."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import SUPPORTED, UNSUPPORTED, Case
from lightning_runs import Classifier, images, trainer, values_of
from recorded import Measured
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, UnsupportedTailError, measure, oracle
from lightning_flatness.curvature.grouping import BatchGroups
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.metrics.evaluation import Evaluation

pytestmark = pytest.mark.cuda
CASES = {case.name: case for case in SUPPORTED}
QUANTITIES = ("hessian_trace", "relative_flatness")
QUESTIONS = 3
"""Whether what was true of the batch before holds; whether each label has one class; whether float32 is enough."""


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the places in the package where the host waits for the device."""
    seen: list[str] = []

    def show(*_: object, **__: object) -> None:
        frames = [frame for frame in traceback.extract_stack() if "lightning_flatness" in frame.filename]
        seen.append(f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "elsewhere")

    with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", show):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            seen.clear()  # of what setting the mode says
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_equals_the_oracle(case: Case, dtype: torch.dtype, rtol: float) -> None:
    model, (x, y) = case.model(), case.data()
    expected = {name: getattr(oracle, name)(model, case.layer, x, y) for name in QUANTITIES}
    batches = [(x[:2].to(dtype).cuda(), y[:2].cuda()), (x[2:].to(dtype).cuda(), y[2:].cuda())]
    with torch.backends.cudnn.flags(allow_tf32=False):  # what the network itself rounds is no error
        report = measure(model.to("cuda", dtype), batches, per_sample=True)
    rtol = max(rtol, 1e-6) if "hardswish" in case.name else rtol  # torch's own has float32 constants on a device
    for name, values in expected.items():
        atol = rtol * 1e-2 * float(values.abs().max())
        torch.testing.assert_close(report.samples[name].cpu().double(), values, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_refuses_what_is_not_exact(case: Case) -> None:
    x, y = case.data()
    with pytest.raises(UnsupportedTailError, match=case.reason):
        measure(case.model().cuda(), [(x.cuda(), y.cuda())], method="pooled")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tensor_cores_are_off_for_the_monitor_alone(precision: str) -> None:
    case, before = CASES["relu"], torch.get_float32_matmul_precision()
    model, (x, y) = case.model(), case.data()
    expected = oracle.relative_flatness(model, case.layer, x, y)
    try:
        torch.set_float32_matmul_precision(precision)
        with Measured(model.eval().float().cuda()) as recorder, torch.no_grad():
            model(x.float().cuda())
            derivatives = recorder.derivatives(y.cuda())
        # What the network itself rounds is in the derivatives; their products are in full precision.
        reference = sample_quantities(derivatives.to(torch.float64)).relative_flatness.cpu()
        value = sample_quantities(derivatives).relative_flatness
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-5, atol=0)
        torch.testing.assert_close(reference, expected, rtol=0.05, atol=0)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("autocast", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_host_waits_for_its_questions_alone(autocast: torch.dtype, memory_format: torch.memory_format) -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().eval().float().cuda().to(memory_format=memory_format), case.data()
    x, y = x.float().cuda().to(memory_format=memory_format), y.cuda()
    evaluation = Evaluation(x.device)
    with Measured(model) as recorder:
        for is_first in (True, False, False):
            with torch.no_grad(), torch.autocast("cuda", autocast, enabled=autocast != torch.float32):
                model(x)
                recorder.step(y)
            with waits() as seen:
                evaluation.update(recorder.quantities(y))
            assert is_first or len(seen) <= QUESTIONS, "\n".join(seen)
    expected = oracle.relative_flatness(case.model(), case.layer, *case.data()).mean()
    rounding = 1e-4 if autocast == torch.float32 else 0.1
    assert evaluation.compute()["flatness/relative"].item() == pytest.approx(expected.item(), rel=rounding)


def test_in_a_group_the_host_waits_once_for_each_batch() -> None:
    case, groups, quantities = CASES["relu"], BatchGroups(), []
    model, (x, y) = case.model().eval().float().cuda(), case.data()
    x, y = x.float().cuda(), y.cuda()
    with Measured(model) as recorder, torch.no_grad():
        for number in range(5):
            model(x)
            recorder.step(y)
            with waits() as seen:
                quantities += groups.add(recorder.method, recorder.passed())
            assert number == 0 or len(seen) == 1, "\n".join(seen)
        with waits() as seen:
            quantities += groups.rest()
        assert len(seen) == QUESTIONS - 1, "\n".join(seen)
    expected = oracle.relative_flatness(case.model(), case.layer, *case.data())
    (found,) = quantities
    torch.testing.assert_close(found.relative_flatness.cpu().double(), expected.repeat(5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_training_is_equal_to_the_last_bit(tmp_path: Path, precision: str) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    options = {"accelerator": "gpu", "devices": 1, "precision": precision, "deterministic": "warn"}
    for callbacks in ((), (FlatnessMonitor(strict=True),)):
        torch.manual_seed(0)
        module = Classifier()
        run = trainer(tmp_path, *callbacks, **options)
        run.fit(module, val_dataloaders=DataLoader(images(13, 2), batch_size=4))
        weights.append(module.state_dict())
    assert all(torch.equal(first, second) for first, second in zip(*(w.values() for w in weights), strict=True))
    assert all(map(torch.isfinite, map(torch.tensor, values_of(run).values())))
