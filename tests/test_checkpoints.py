"""The command line that measures checkpoints, against `measure` on the same weights and samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning_runs import Network, images, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatness import checkpoints, measure


class Module(L.LightningModule):
    """Its loss is smoothed, which only its own step knows."""

    def __init__(self, width: int = 4, smoothing: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Network().double()
        self.net.head = nn.Linear(4, 3).double()
        self.extra = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.hparams["smoothing"])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


class Itself(Module):
    """Has its own validation data, in two loaders."""

    def val_dataloader(self) -> Any:
        return [DataLoader(images(9, 3), batch_size=4), DataLoader(images(5, 4), batch_size=4)]


class Unsaved(Module):
    def __init__(self, needed: int, **options: Any) -> None:
        super().__init__(**options)
        self.hparams.clear()


class Data(L.LightningDataModule):
    def __init__(self, n: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(images(12, 1), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(images(self.hparams["n"], 2), batch_size=4)


class OnlyTraining(L.LightningDataModule):
    pass


class Squared(Module):
    """A loss that is no sum over samples."""

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch) ** 2


HERE = ["--model", f"{__name__}:Module", "--data", f"{__name__}:Data"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one training."""
    folder = tmp_path_factory.mktemp("saved")
    sys.modules.setdefault(__name__, sys.modules[Module.__module__])
    paths = []
    run, module = trainer(folder, max_epochs=1), Module(smoothing=0.2)
    for name in ("first.ckpt", "second.ckpt"):
        run.fit(module, datamodule=Data(11))
        run.save_checkpoint(folder / name)
        paths.append(folder / name)
        run = trainer(folder, max_epochs=3)
    return paths


def expected(path: Path, loader: DataLoader, **options: Any) -> Any:
    model = Module()
    model.load_state_dict(torch.load(path)["state_dict"])
    return measure(model, loader, loss=nn.CrossEntropyLoss(label_smoothing=0.2), **options)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, list[dict[str, Any]]]:
    assert checkpoints.main([*map(str, arguments), "--json", "out.json"]) == 0
    return capsys.readouterr().out, json.loads(Path("out.json").read_text())


@pytest.mark.parametrize("options", [{}, {"max_samples": 7}, {"layer": "net.conv2"}], ids=str)
def test_values_are_those_of_measure_with_the_steps_own_loss(
    saved: list[Path], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    printed, written = run(capsys, *saved, *HERE, *flags)
    assert [entry["checkpoint"] for entry in written] == list(map(str, saved))
    for path, entry in zip(saved, written, strict=True):
        report = expected(path, Data(11).val_dataloader(), **options)
        assert entry["values"]["flatness/relative"] == pytest.approx(report.relative_flatness, rel=1e-9)
        assert entry["values"]["flatness/scale_free"] == pytest.approx(report.scale_free_flatness, rel=1e-9)
        assert entry["values"]["margin/mean"] == pytest.approx(report.margins["mean"], rel=1e-9)
        assert entry["accuracy"] == pytest.approx(1 - report.margins["negative"])
        assert entry["measured"] == "`net.conv2` up to the loss"
        assert f"flatness/relative             {report.relative_flatness:.6g}" in printed
    assert written[0]["values"] != written[1]["values"]
    table = printed.rsplit("\n\n", 1)[1].splitlines()
    assert len({len(line) for line in table}) == 1
    heading, _, *rows = table
    assert [str(path) in row for path, row in zip(saved, rows, strict=True)] == [True, True]
    for word in ("Accuracy", "Relative flatness", "Scale-free flatness", "Mean output margin"):
        assert word in heading


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--method", "classifier"], {"method": "classifier"}),
        (["--method", "jacobian", "--layer", "all"], {"method": "jacobian", "layer": "all"}),
        (
            ["--method", "jacobian", "--layer", "net.conv2", "--layer", "net.head"],
            {"method": "jacobian", "layer": ["net.conv2", "net.head"]},
        ),
    ],
    ids=["classifier", "all", "two layers"],
)
def test_any_method(
    saved: list[Path], flags: list[str], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    printed, (entry,) = run(capsys, saved[0], *HERE, *flags)
    report = expected(saved[0], Data(11).val_dataloader(), **options)
    if report.relative_flatness is not None:
        assert entry["values"]["flatness/relative"] == pytest.approx(report.relative_flatness, rel=1e-9)
        return
    found = {key.split("/")[2]: value for key, value in entry["values"].items() if "flatness/relative/" in key}
    assert found == pytest.approx({name: layer.relative_flatness for name, layer in report.layers.items()}, rel=1e-9)
    if report.network_trace is not None:
        assert entry["values"]["flatness/trace/network"] == pytest.approx(report.network_trace, rel=1e-9)
    assert ("Hessian trace, network" in printed) == (report.network_trace is not None)


def test_each_loader_of_a_module_with_its_own_data_has_its_row(
    saved: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    printed, written = run(capsys, saved[0], "--model", f"{__name__}.Itself")
    assert [entry["loader"] for entry in written] == ["/dataloader_idx_0", "/dataloader_idx_1"]
    for loader, entry in zip(Itself().val_dataloader(), written, strict=True):
        report = expected(saved[0], loader)
        assert entry["values"]["flatness/trace"] == pytest.approx(report.hessian_trace, rel=1e-9)
    assert printed.count("/dataloader_idx_1") == 2


CONFIG = """
seed_everything: 3
ckpt_path: null
trainer:
  max_epochs: 7
model:
  class_path: {name}.Module
  init_args:
    smoothing: 0.2
data:
  class_path: {name}.Data
  init_args:
    n: 6
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_of_lightning_cli(saved: list[Path], nested: bool, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    text = CONFIG.format(name=__name__)
    Path("config.yaml").write_text("fit:" + text.replace("\n", "\n  ") if nested else text)
    _, (entry,) = run(capsys, saved[1], "--config", "config.yaml")
    report = expected(saved[1], Data(6).val_dataloader())
    assert entry["values"]["flatness/relative"] == pytest.approx(report.relative_flatness, rel=1e-9)


def bad_files(saved: list[Path]) -> None:
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"weights": 1}, "weights.ckpt")
    state = torch.load(saved[0])
    state["state_dict"]["net.head.weight"] = torch.zeros(5, 4)
    torch.save(state, "wider.ckpt")
    Path("no_model.yaml").write_text("trainer: {}")
    Path("bad.yaml").write_text("model: {class_path: [")
    Path("unknown.yaml").write_text(CONFIG.format(name=__name__).replace("smoothing", "smoothness"))


REFUSED: dict[str, tuple[list[str], str]] = {
    "no file": (["gone.ckpt", *HERE], "A checkpoint must be a file; 'gone.ckpt' is none"),
    "no text": (["text.ckpt", *HERE], "'text.ckpt' must be a checkpoint of `Module`"),
    "no checkpoint of Lightning": (["weights.ckpt", *HERE], "'weights.ckpt' must be a checkpoint of `Module`"),
    "another architecture": (["wider.ckpt", *HERE], "or of another architecture: .*size mismatch for net.head.weight"),
    "no module": (["first.ckpt"], "The module must be named; got none"),
    "unknown module": (["first.ckpt", "--model", "nowhere:Net"], "`--model` must be .*; got 'nowhere:Net': No module"),
    "unknown class": (["first.ckpt", "--model", f"{__name__}:Nothing"], "has no attribute 'Nothing'"),
    "another class": (["first.ckpt", "--model", "torch.nn:Linear"], "a LightningModule, .*; 'torch.nn:Linear' is none"),
    "no data module": ([*HERE[:2], "--data", "torch.nn:Linear", "first.ckpt"], "a LightningDataModule, .* is none"),
    "arguments": (["first.ckpt", "--model", f"{__name__}:Unsaved", *HERE[2:]], "missing 1 required .*'needed'"),
    "no validation data": (["first.ckpt", *HERE[:2]], "`Module` must give validation data; it has no `val_dataloader`"),
    "only training": (["first.ckpt", *HERE[:2], "--data", f"{__name__}:OnlyTraining"], "it has no `val_dataloader`"),
    "layers": (["first.ckpt", *HERE, "--layer", "a", "--layer", "b"], "`layer` must be the name of one convolution"),
    "no layer": (["first.ckpt", *HERE, "--method", "jacobian"], "needs the layers to measure"),
    "layer": (["first.ckpt", *HERE, "--layer", "conv7"], "'first.ckpt' cannot be measured: .*conv7"),
    "loss": (["first.ckpt", "--model", f"{__name__}:Squared", *HERE[2:]], "cannot be measured: .*sum over samples"),
    "samples": (["first.ckpt", *HERE, "--max-samples", "0"], "--max-samples: must be a whole number from 1"),
    "json": (["first.ckpt", *HERE, "--json", "no/folder.json"], "`--json` must be a file that can be written"),
    "no config": (["first.ckpt", "--config", "gone.yaml"], "`--config` must be a YAML file of LightningCLI"),
    "bad config": (["first.ckpt", "--config", "bad.yaml"], "`--config` must be a YAML file of LightningCLI"),
    "config without model": (["first.ckpt", "--config", "no_model.yaml"], "'no_model.yaml' has no `model`"),
    "unknown argument": (["first.ckpt", "--config", "unknown.yaml"], "must be a configuration of .*smoothness"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said_in_a_sentence(
    saved: list[Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_files(saved)
    Path("first.ckpt").write_bytes(saved[0].read_bytes())
    with pytest.raises(SystemExit, match="2"):
        checkpoints.main(arguments)
    said = capsys.readouterr().err
    with pytest.raises(RuntimeError, match=rf"(?s)measure: error: .*{message}"):
        raise RuntimeError(said)
    assert "Traceback" not in said


MODULE = """
from lightning_flatness.examples.digits import DigitsClassifier as Net, DigitsDataModule as Data
"""


def test_as_a_program(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    Path("mine.py").write_text(MODULE)
    from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule

    run = trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    model = DigitsClassifier()
    run.fit(model, datamodule=DigitsDataModule())
    run.save_checkpoint("digits.ckpt")
    accuracy = float(run.validate(model, datamodule=DigitsDataModule(), verbose=False)[0]["val_accuracy"])
    command = [sys.executable, "-m", "lightning_flatness", "measure", "digits.ckpt"]
    done = subprocess.run(
        [*command, "--model", "mine:Net", "--data", "mine:Data"],
        env={**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"accuracy                      {accuracy:.2%}" in done.stdout
    assert "Validation" not in done.stdout  # the progress bar is on stderr
    assert "Validation" in done.stderr
