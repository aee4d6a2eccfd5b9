from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary

from lightning_flatness import Action, AllOf, AnyOf, FlatnessMonitor, Notify, ReduceLR, Rule, StopTraining
from lightning_flatness.rules import default

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
from lightning.pytorch.cli import LightningCLI

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "examples" / "cli.yaml"
OPTIONS = "max_epochs=1 limit_train_batches=2 limit_val_batches=1 accelerator=cpu enable_progress_bar=false"
FIT = ["fit", "--config", str(EXAMPLE), *(f"--trainer.{option}" for option in OPTIONS.split())]


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of others


def rules_of(cli: LightningCLI) -> list[Any]:
    monitors = [callback for callback in cli.trainer.callbacks if isinstance(callback, FlatnessMonitor)]
    return plain([monitor._runner.rules for monitor in monitors])


def plain(value: Any) -> Any:
    """Rules and actions as what can be compared."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Rule | AllOf | AnyOf | Action):
        public = {name: plain(each) for name, each in vars(value).items() if not name.startswith("_")}
        return {type(value).__name__: public}
    return value


def test_the_example_trains_and_comes_back_from_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    cli = LightningCLI(args=FIT)
    escalating = [Notify(print), ReduceLR(0.1, min_lr=1e-6), StopTraining()]
    conditions = [Rule("flatness/relative", shift_up=8.0), Rule("margin/mean", shift_down=8.0)]
    expected = [
        [
            Rule("flatness/scale_free", rise=0.5, patience=3, cooldown=5, action=escalating),
            AllOf(conditions, patience=2, action=StopTraining()),
        ],
        default(suffix="/train"),
    ]
    assert rules_of(cli) == plain(expected)
    assert {"flatness/relative", "flatness/relative/train"} <= set(cli.trainer.callback_metrics)

    saved = Path(cli.trainer.log_dir, "config.yaml")  # what LightningCLI saves in every run
    capsys.readouterr()
    with pytest.raises(SystemExit):
        LightningCLI(args=[*FIT, "--print_config"])
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    for config in (saved, printed):
        again = LightningCLI(args=["fit", "--config", str(config)], save_config_callback=None)
        assert rules_of(again) == plain(expected)


def test_the_page_shows_the_example() -> None:
    assert EXAMPLE.read_text() in (DOCS / "how-to" / "cli.md").read_text()


def command_line(*arguments: str) -> LightningCLI:
    model = "--model=lightning_flatness.examples.digits.DigitsClassifier"
    return LightningCLI(args=[model, *arguments], run=False, save_config_callback=None)


def test_a_monitor_from_the_shell() -> None:
    cli = command_line(
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary",
        "--trainer.callbacks+=lightning_flatness.FlatnessMonitor",
        "--trainer.callbacks.max_samples=100",
        '--trainer.callbacks.rules=[{"monitor": "margin/mean", "below": 0, "action": "StopTraining"}]',
    )
    assert rules_of(cli) == plain([[Rule("margin/mean", below=0.0, action=StopTraining())]])
    assert any(isinstance(callback, ModelSummary) for callback in cli.trainer.callbacks)


BAD = {
    "unknown field": ('[{"monitr": "margin/mean", "below": 0}]', "Option 'monitr' is not accepted"),
    "unknown choice": ('[{"rise": 0.5, "reference": "last"}]', "Expected a typing.Literal['settled', 'best', 'ema'"),
    "not a number": ('[{"rise": "much"}]', "Expected a <class 'float'>"),
    "two conditions": ('[{"rise": 0.5, "above": 1}]', "must have exactly one of rise, above, below, shift_up"),
    "negative patience": ('[{"rise": 0.5, "patience": -1}]', "`patience` must be a whole number of validations"),
    "unknown set": ("defaults", "Expected a typing.Literal['default']"),
    "unknown action": ('[{"rise": 0.5, "action": {"class_path": "lightning_flatness.Stop"}}]', "no attribute 'Stop'"),
    "unknown argument": (
        '[{"rise": 0.5, "action": {"class_path": "ReduceLR", "init_args": {"by": 2}}}]',
        "Option 'by' is not accepted",
    ),
    "factor": (
        '[{"rise": 0.5, "action": {"class_path": "ReduceLR", "init_args": {"factor": 2}}}]',
        "`factor` must lie between 0 and 1, both excluded; got 2.0.",
    ),
    "function": (
        '[{"rise": 0.5, "action": {"class_path": "Notify", "init_args": {"function": "builtins.tell"}}}]',
        "module 'builtins' has no attribute 'tell'",
    ),
}


@pytest.mark.parametrize(("rules", "reason"), BAD.values(), ids=BAD)
def test_a_bad_rule_is_refused_with_the_reason(rules: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        command_line("--trainer.callbacks+=lightning_flatness.FlatnessMonitor", f"--trainer.callbacks.rules={rules}")
    said = f"{refused.value}\n{capsys.readouterr().err}".splitlines()
    assert any(reason in line and len(line) < 250 for line in said), said
