"""`python -m lightning_flatness` runs the demo; `measure ...` measures checkpoints, `report ...` shows log folders."""

from __future__ import annotations

import sys

from lightning_flatness import checkpoints, demo, report

COMMANDS = {"demo": demo.main, "measure": checkpoints.main, "report": report.main}


def main(argv: list[str]) -> int:
    """Run the command that the first argument names, else the demo."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return demo.main(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
