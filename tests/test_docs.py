"""What the documentation tells people to type: every block of Python and every command, as written."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_flatness.__main__ import COMMANDS, main

pytest.importorskip("sklearn")
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule, ResidualGapNet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = {"bash", "sh", "console"}
FENCE = re.compile(r"^``` ?\{? ?\.?(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = ("python", "make ", "pip ", "tensorboard ", "wandb ", "git ", ".venv/bin/")
# Lightning's own options that make a training short; what it prints and saves goes into the test's folder.
SHORT = {
    "max_epochs": 1,
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
OPTIONS = [f"--trainer.{name}={str(value).lower()}" for name, value in SHORT.items()]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    yield from FENCE.findall(page.read_text(encoding="utf-8"))


def commands() -> Iterator[str]:
    """Of blocks, of indented lines, and of code within sentences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = "\n".join(code for language, code in blocks(page) if language in SHELLS or "make " in code)
        lines += "\n" + "\n".join(re.findall(r"^    (?=\S)(.*)", text, re.MULTILINE))
        plain = FENCE.sub("", text)
        lines += "\n" + "\n".join(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", plain))
        for line in lines.replace("\\\n", "").splitlines():
            yield from (part.strip() for part in re.split(r"&&|\s#\s", line) if part.strip().startswith(STARTS))



def names() -> dict[str, Any]:
    """What the text around the blocks takes for granted."""
    data = DigitsDataModule()
    data.setup("fit")
    batches = [tuple(tensor[:32] for tensor in data.validation.tensors)]
    loaders = {name: batches for name in ("loader", "val_loader")}
    return {"model": DigitsClassifier(), "train_loader": data.train_dataloader(), **loaders, "training_set": data}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Trainer trains two batches, every search has one trial."""
    original = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: original(**{**options, **SHORT}))
    if importlib.util.find_spec("optuna"):
        import optuna

        search = optuna.Study.optimize
        monkeypatch.setattr(optuna.Study, "optimize", lambda study, aim, n_trials: search(study, aim, n_trials=1))


with_python = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", with_python, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = names()
    for language, code in blocks(page):
        if language == "python" and "LightningCLI()" not in code:  # which a command below runs
            exec(compile(code, str(page), "exec"), namespace)
