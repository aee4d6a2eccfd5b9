"""The checkpoint that is kept: the flattest of those within the tolerance of the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, FlattestCheckpoint

NAN, FLATNESS = float("nan"), "flatness/relative"


class Scores(LightningModule):
    """Logs these metrics and flatnesses, one pair in each validation; its weight counts the steps."""

    def __init__(self, scores: list[tuple[float, float | None]], key: str = "flatness/relative") -> None:
        super().__init__()
        self.weight, self.scores, self.key = nn.Parameter(torch.zeros(1)), scores, key

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        score, flatness = self.scores[self.current_epoch]
        self.log("val_acc", score)
        if flatness is not None:
            self.log(self.key, flatness)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> Any:
        return DataLoader(range(1))

    val_dataloader = train_dataloader


def fitted(folder: Path, scores: list[Any], checkpoint: ModelCheckpoint, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=len(scores),
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(Scores(scores, getattr(checkpoint, "flatness", "flatness/relative")), **options)
    return trainer


# (metric, flatness) of each validation, the chosen epoch, and the epochs that stay on the disk.
RUNS: dict[str, tuple[list[tuple[float, float | None]], int, set[int]]] = {
    "an untrained network is flat": ([(0.1, 0.01), (0.9, 5.0)], 1, {1}),
    "the flattest within the tolerance": ([(0.9, 5.0), (0.89, 2.0), (0.885, 3.0)], 1, {0, 1}),
    "a better one that is flatter replaces all": ([(0.9, 5.0), (0.89, 4.0), (0.91, 2.0)], 2, {2}),
    "a better one ends the tolerance of others": ([(0.9, 1.0), (0.93, 5.0), (0.925, 4.0)], 2, {1, 2}),
    "worse and sharper is not saved": ([(0.9, 1.0), (0.895, 2.0)], 0, {0}),
    "equal values: the first": ([(0.9, 1.0), (0.9, 1.0)], 0, {0}),
    "not measured is the sharpest": ([(0.9, NAN), (0.895, 2.0), (0.9, 3.0)], 1, {1, 2}),
    "never measured: the metric decides": ([(0.8, None), (0.9, None), (0.85, None)], 1, {1}),
    "metric not a number": ([(NAN, 1.0), (0.5, 9.0)], 1, {1}),
}


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("name", RUNS)
def test_which_checkpoint_is_kept(name: str, mode: Any, tmp_path: Path) -> None:
    scores, chosen, kept = RUNS[name]
    signed = [(score if mode == "max" else -score, flatness) for score, flatness in scores]
    checkpoint = FlattestCheckpoint("val_acc", mode, 0.02, FLATNESS, dirpath=tmp_path, filename="{epoch}")
    fitted(tmp_path, signed, checkpoint)
    assert Path(checkpoint.best_model_path).stem == f"epoch={chosen}"
    assert float(checkpoint.best_model_score) == pytest.approx(signed[chosen][0])
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"epoch={epoch}" for epoch in kept}
    weights = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]["weight"]
    assert weights.item() == chosen + 1


@pytest.mark.parametrize(
    ("key", "chosen"), [("flatness/trace", 1), ("margin/scale_free", 2), ("margin/mean/mine", 2), ("my/own", 1)]
)
def test_the_better_value_breaks_the_tie(key: str, chosen: int, tmp_path: Path) -> None:
    checkpoint = FlattestCheckpoint("val_acc", "max", 0.02, flatness=key, dirpath=tmp_path, filename="{epoch}")
    fitted(tmp_path, [(0.9, 2.0), (0.895, 1.0), (0.89, 3.0), (0.5, 9.0)], checkpoint)
    assert Path(checkpoint.best_model_path).stem == f"epoch={chosen}"


def test_the_default_is_the_largest_scale_free_margin(tmp_path: Path) -> None:
    checkpoint = FlattestCheckpoint("val_acc", "max", 0.02, dirpath=tmp_path, filename="{epoch}")
    fitted(tmp_path, [(0.9, 2.0), (0.89, 3.0), (0.895, 1.0)], checkpoint)
    assert (checkpoint.flatness, Path(checkpoint.best_model_path).stem) == ("margin/scale_free", "epoch=1")


def test_a_resumed_training_goes_on_with_its_candidates(tmp_path: Path) -> None:
    scores = [(0.9, 5.0), (0.89, 2.0), (0.91, 3.0), (0.905, 2.5)]
    whole, begun, resumed = (
        FlattestCheckpoint(
            "val_acc", "max", 0.03, FLATNESS, dirpath=tmp_path / name, filename="{epoch}", save_last=True
        )
        for name in ("whole", "parts", "parts")
    )
    fitted(tmp_path, scores, whole)
    fitted(tmp_path, scores[:2], begun)
    fitted(tmp_path, scores, resumed, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    assert Path(whole.best_model_path).name == Path(resumed.best_model_path).name == "epoch=1.ckpt"
    names = [{path.name for path in (tmp_path / name).glob("*.ckpt")} for name in ("whole", "parts")]
    assert names[0] == names[1] == {"epoch=1.ckpt", "epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"}


def test_it_stands_beside_another_checkpoint_and_the_last_weights(tmp_path: Path) -> None:
    checkpoint = FlattestCheckpoint("val_acc", "max", 0.0, dirpath=tmp_path, filename="{epoch}", save_last=True)
    fitted(tmp_path, [(0.9, 1.0), (0.5, 0.5)], checkpoint)
    assert Path(checkpoint.best_model_path).stem == "epoch=0"
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {"epoch=0", "last"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -0.1}, "`tolerance` must be a number, at least 0, in the unit of `val_acc`; got -0.1"),
        ({"tolerance": "1%"}, "`tolerance` must be a number"),
        ({"tolerance": NAN}, "`tolerance` must be a number"),
        ({"tolerance": 0.1, "save_top_k": 3}, "`save_top_k` must not be given"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlattestCheckpoint("val_acc", "max", **arguments)


# Of the four settings in which flatness alone keeps a network that has hardly learnt.
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "rate 0.05": (0.05, {}),
    "rate 0.005": (0.005, {}),
    "rate 0.001": (0.001, {}),
    "four validations an epoch": (0.05, {"val_check_interval": 0.25}),
}


@pytest.mark.parametrize(("rate", "options"), SETTINGS.values(), ids=SETTINGS)
def test_the_advice_of_the_readme(tmp_path: Path, rate: float, options: dict[str, Any]) -> None:
    pytest.importorskip("sklearn")
    from lightning_flatness.examples.digits import DigitsClassifier, digits_split

    training, validation = ([part[at] for at in range(256)] for part in digits_split())
    monitor = FlatnessMonitor(max_samples=64, verify=False, figure_every_n_validations=0)
    checkpoint = FlattestCheckpoint("val_accuracy", mode="max", tolerance=0.02, dirpath=tmp_path)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor, checkpoint],
        **options,
    )
    trainer.fit(DigitsClassifier(rate), DataLoader(training, 32), DataLoader(validation, 256))
    accuracy, margin = (monitor.history.values[key] for key in ("val_accuracy", "margin/scale_free"))
    kept = monitor.history.steps.index(torch.load(checkpoint.best_model_path)["global_step"] - 1)
    allowed = [at for at, value in enumerate(accuracy) if value >= max(accuracy) - 0.02]
    assert kept == max(allowed, key=lambda at: margin[at])
