"""The command line that writes the page, and the page and TensorBoard as a browser shows them."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_runs import Classifier, trainer

from lightning_flatness import FlatnessMonitor, Rule, report
from lightning_flatness.reporting import page

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
ROWS = "step,val_acc,flatness/relative\n1,0.5,{}\n2,0.25,4\n"
SORT = """<p id="orders"></p><script>
const button = document.querySelector("button[aria-label='Relative flatness, first']");
for (let click = 0; click < 3; click++) {
  button.click();
  const names = [...document.querySelectorAll("#runs a")].map((link) => link.textContent);
  document.querySelector("#orders").append(`${button.parentElement.ariaSort} ${names.join(" ")}; `);
}
</script></body>"""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a quarter of a second a picture; the tests of `reporting.page` have them."""
    monkeypatch.setattr(page, "_picture", lambda draw: {"light": "data:,", "dark": "data:,"})


def write(**first: str) -> None:
    for name, value in first.items():
        folder = Path("logs", name)
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(ROWS.format(value))


def test_python_m_writes_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(a="2")
    for arguments, file in (([], "report.html"), (["-o", "mine.html", "--metric", "val_acc"], "mine.html")):
        monkeypatch.setattr(sys, "argv", ["lightning_flatness", "report", "logs", *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("lightning_flatness", run_name="__main__")
        assert capsys.readouterr().out == f"{file}\n"
        assert "Relative flatness" in Path(file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "A log folder must exist; 'gone' does not"),
        (["empty"], "A log folder must hold .*; 'empty' holds neither"),
        (["logs", "--metric", "f1"], "`metric` must be a metric of the module .*; got 'f1'. The logs have: val_acc"),
        (["logs", "-o", "gone/page.html"], "`--output` must be a file that can be written; got 'gone/page.html'"),
        ([], "the following arguments are required: LOGDIR"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    write(a="2")
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"report: error: {message}", line), line


def rendered(address: str) -> str:
    """Return the page of an address after its scripts have run, as text; skip where there is no Chromium."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    if (program := next(filter(None, map(shutil.which, programs)), None)) is None:
        pytest.skip(f"needs a browser: none of {', '.join(programs)} is installed")
    options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=4000 --dump-dom".split()
    profile = f"--user-data-dir={Path('profile').absolute()}"
    done = subprocess.run([program, *options, profile, address], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"needs a browser: {program} ends with {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def text_of(html: str) -> str:
    without_code = re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", without_code).split())


def test_a_browser_sorts_the_table() -> None:
    write(a="3", b="20", c="nan", d="100")
    report.main(["logs"])
    text = Path("report.html").read_text(encoding="utf-8").replace("</body>", SORT)
    Path("sorted.html").write_text(text, encoding="utf-8")
    shown = text_of(rendered(Path("sorted.html").absolute().as_uri()))
    assert "descending d b a c; ascending a b d c; descending d b a c;" in shown
    for words in ("Flatness report", "val_acc", "No alerts"):
        assert words in shown


def test_a_browser_shows_our_groups_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard import program

    rules = [Rule("flatness/trace", above=-1.0)]
    logger = TensorBoardLogger(tmp_path / "logs", name="run", version="")
    trainer(tmp_path, FlatnessMonitor(rules=rules), logger=[logger, CSVLogger("csv")]).fit(Classifier())
    board = program.TensorBoard()
    board.configure(
        argv=[None, "--logdir", str(tmp_path / "logs"), "--port", "0", "--load_fast", "false", "--reload_interval", "0"]
    )
    address = f"{board.launch()}#timeseries"
    for _ in range(3):  # it may still be reading
        if "cards" in (shown := text_of(rendered(address))):
            break
    groups = re.findall(r"(\w+) \d cards", shown)
    ours = ["flatness", "margin_quantiles", "margin_statistics", "monitor", "per_sample", "relative_flatness_factors"]
    assert [group for group in groups if group in ours] == ours
    assert "flatness 3 cards" in shown
    for tab in ("Custom Scalars", "images", "histograms", "text"):
        assert tab in shown


def test_a_browser_shows_the_home_of_the_documentation() -> None:
    home = ROOT / "site" / "index.html"
    if not home.exists():
        pytest.skip("needs the documentation: run `make docs`")
    shown = text_of(rendered(home.as_uri()))
    for words in ("A dashboard in five minutes", "Reading the dashboard", "FlatnessMonitor"):
        assert words in shown
