"""The same numbers on a CUDA device as from the oracle on the CPU, and nothing that holds the device up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import SUPPORTED, UNSUPPORTED, Case
from lightning_runs import Classifier, images, trainer, values_of
from recorded import Measured
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, UnsupportedTailError, measure, oracle
from lightning_flatness.curvature.pooled.closed_form import sample_quantities
from lightning_flatness.metrics.evaluation import Evaluation

pytestmark = pytest.mark.cuda
CASES = {case.name: case for case in SUPPORTED}
QUANTITIES = ("hessian_trace", "relative_flatness")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_equals_the_oracle(case: Case, dtype: torch.dtype, rtol: float) -> None:
    model, (x, y) = case.model(), case.data()
    expected = {name: getattr(oracle, name)(model, case.layer, x, y) for name in QUANTITIES}
    batches = [(x[:2].to(dtype).cuda(), y[:2].cuda()), (x[2:].to(dtype).cuda(), y[2:].cuda())]
    report = measure(model.to("cuda", dtype), batches, per_sample=True)
    for name, values in expected.items():
        torch.testing.assert_close(report.samples[name].cpu().double(), values, rtol=rtol, atol=rtol * 1e-4)


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_refuses_what_is_not_exact(case: Case) -> None:
    x, y = case.data()
    with pytest.raises(UnsupportedTailError):
        measure(case.model().cuda(), [(x.cuda(), y.cuda())])


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
def test_after_the_first_batch_the_host_never_waits(autocast: torch.dtype, memory_format: torch.memory_format) -> None:
    case = CASES["relu"]
    model, (x, y) = case.model().eval().float().cuda().to(memory_format=memory_format), case.data()
    x, y = x.float().cuda().to(memory_format=memory_format), y.cuda()
    evaluation = Evaluation(x.device)
    try:
        with Measured(model) as recorder:
            for mode in ("default", "error", "error"):
                with torch.no_grad(), torch.autocast("cuda", autocast, enabled=autocast != torch.float32):
                    model(x)
                torch.cuda.set_sync_debug_mode(mode)
                evaluation.update(recorder.quantities(y))
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = oracle.relative_flatness(case.model(), case.layer, *case.data()).mean()
    rounding = 1e-4 if autocast == torch.float32 else 0.1
    assert evaluation.compute()["flatness/relative"].item() == pytest.approx(expected.item(), rel=rounding)


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
