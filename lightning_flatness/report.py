"""Make one HTML page of the trainings in log folders of TensorBoard or CSV; it opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_flatness.reporting.page import html_report
from lightning_flatness.terminal import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of `html_report` to a file.

    Args:
        argv: command-line arguments without the name of the program and `report`; None: those of the process.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: with status 2 and a sentence on stderr, if there is nothing to show or the file cannot be written.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        page = html_report(*arguments.folders, metric=arguments.metric)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    try:
        arguments.output.write_text(page, encoding="utf-8")
    except OSError as error:
        parser.error(
            f"`--output` must be a file that can be written; got {str(arguments.output)!r} ({error.strerror}). "
            "Name another one."
        )
    print(arguments.output)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m lightning_flatness report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOGDIR", help="a log folder, or one with several")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="where the page is written (default: %(default)s)",
    )
    parser.add_argument("--metric", metavar="NAME", help="your own metric that stands first (default: `val...acc...`)")
    return parser
