"""What the documentation tells people to type: its Python runs as written, and so do its commands, or they exist."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness.__main__ import COMMANDS, main
from lightning_flatness.keys import KEYS

pytest.importorskip("sklearn")
from lightning_flatness.examples.digits import DigitsClassifier, DigitsDataModule

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^``` ?\{? ?\.?(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'--8<-- "(.*)"')
STARTS = ("python ", "make ", "pip install ", "tensorboard ", "wandb ", ".venv/bin/")
SHORT = {
    "max_epochs": 1,
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
DIGITS = "lightning_flatness.examples.digits"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code; a file that the page shows stands in the place of its name."""
    return [
        (language, SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), code))
        for language, code in FENCE.findall(page.read_text(encoding="utf-8"))
    ]


def commands() -> Iterator[str]:
    """Those in blocks, in indented lines, and within sentences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [code for language, code in blocks(page) if language != "python"]
        code += re.findall(r"^    (\S.*)", text, re.MULTILINE)
        code += [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
        for line in "\n".join(code).replace("\\\n", "").splitlines():
            for part in re.split(r"&&|\s#\s", line):
                command = re.sub(r"^([A-Z_]+=\S+ )+|^srun ", "", part.strip())
                if command.startswith(STARTS):
                    yield command


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every Trainer trains for two batches, every search has one trial."""
    original = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: original(**{**options, **SHORT}))
    if importlib.util.find_spec("optuna"):
        import optuna

        search = optuna.Study.optimize
        monkeypatch.setattr(optuna.Study, "optimize", lambda study, aim, n_trials: search(study, aim, n_trials=1))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(language == "python" for language, _ in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page_runs(page: Path) -> None:
    if page.stem == "optuna":
        pytest.importorskip("optuna_integration")
    data = DigitsDataModule()
    data.setup("fit")
    loader = DataLoader(TensorDataset(*(tensor[:32] for tensor in data.validation.tensors)), batch_size=32)
    # What the sentences around the blocks take for granted.
    names: dict[str, Any] = dict.fromkeys(["loader", "train_loader", "val_loader"], loader)
    names["model"] = DigitsClassifier()
    for name in ("first", "second") if page.stem == "report" else ():
        logger = CSVLogger("logs", name, version="")
        logger.log_metrics({"val_acc": 0.9, "flatness/relative": 3.0}, step=7)
        logger.save()
    for language, code in blocks(page):
        if language == "python" and "LightningCLI()" not in code:  # which the commands run
            names["__name__"] = "page" if "sys.argv" in code else "__main__"
            exec(compile(code, str(page), "exec"), names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the commands find in it."""
    (tmp_path / "train.py").write_text(blocks(ROOT / "docs" / "how-to" / "cli.md")[0][1])
    (tmp_path / "cli.yaml").write_text((ROOT / "docs" / "examples" / "cli.yaml").read_text(encoding="utf-8"))
    classes = "DigitsClassifier as Classifier, DigitsDataModule as Images"
    (tmp_path / "mine.py").write_text(f"from {DIGITS} import {classes}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", sorted(set(commands())), ids=str)
def test_a_command_runs_or_exists(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(command)
    match program.removeprefix(".venv/bin/"), words:
        case "make", [target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case "pip", ["install", *packages]:
            extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
            named = {extra for package in packages if package[0] == "." for extra in re.findall(r"\w+", package[1:])}
            assert named <= {*extras, "lightning", "flatness"}
        case "python", ["-m", "lightning_flatness", "measure", *options]:
            trainer = L.Trainer(logger=False, **{**SHORT, "max_epochs": 0})
            trainer.fit(DigitsClassifier(), DigitsDataModule())
            for name in (word for word in options if word.endswith(".ckpt")):
                trainer.save_checkpoint(folder / name)
            assert main(["measure", *options]) == 0
        case "python", ["-m", "lightning_flatness", *options]:
            named = [options[0]] if options and options[0] in COMMANDS else []
            with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
                main([*named, "--help"])
            assert {word for word in options if word[:2] == "--"} <= set(re.findall(r"--[\w-]+", shown.getvalue()))
        case "python", ["train.py", *options]:
            run_training(options, folder, monkeypatch)
        case "python", ["-m", module, *options]:
            assert importlib.util.find_spec(module)
            assert all((ROOT / word).exists() for word in options if "/" in word)
        case "python", [script, *_]:
            assert any((ROOT / place / script).is_file() for place in (".", "docs/examples"))
        case ("tensorboard" | "wandb" | "ruff") as name, _:
            assert name == "ruff" or name in {script.name for script in entry_points(group="console_scripts")}
        case _:
            pytest.fail("This test does not know the command yet.")


def run_training(options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python train.py ...` of the page about LightningCLI for a moment."""
    pytest.importorskip("jsonargparse")
    if "..." in options:
        place = options.index("...")
        options[place : place + 1] = ["--model", f"{DIGITS}.DigitsClassifier", "--data", f"{DIGITS}.DigitsDataModule"]
    is_shown = bool({"--print_config", "--trainer.callbacks.help"} & set(options))
    short = [] if is_shown else [f"--trainer.{name}={str(value).lower()}" for name, value in SHORT.items()]
    short += [] if is_shown else ["--trainer.max_epochs=0"]  # tests/test_cli.py trains the example
    monkeypatch.setattr("sys.argv", ["train.py", *options, *short])
    with pytest.raises(SystemExit) if is_shown else nullcontext() as end:
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
    assert not is_shown or end.value.code in (0, None)


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)  # MkDocs checks the others
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if ":" not in link and not (ROOT / link).exists()]


def test_the_gallery_has_every_key() -> None:
    page = ROOT / "docs" / "reference" / "gallery.md"
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^### `(\w+/\w+)`", text, re.MULTILINE) == list(KEYS)
    pictures = re.findall(r"\(\.\./(images/gallery/[\w-]+\.png)\)", text)
    assert len(pictures) == len(KEYS) + 2  # and those of a report
    assert all((page.parents[1] / picture).stat().st_size < 80_000 for picture in pictures)
