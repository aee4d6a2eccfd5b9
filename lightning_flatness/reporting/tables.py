"""A small table, as text for a console, as Markdown for a logger and as HTML for a notebook."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

_BETWEEN_CELLS = re.compile(r"(?<!\\) \| ")


class Table:
    """Columns of cells by their heading.

    Args:
        columns: of the same length.

    Example:
        >>> print(Table({"epoch": ["0", "1"], "loss": ["2.31", "0.4"]}))
        epoch  loss
        -----  ----
            0  2.31
            1   0.4
    """

    def __init__(self, columns: Mapping[str, Sequence[str]]) -> None:
        self.headings = list(columns)
        self.rows = list(zip(*columns.values(), strict=True))

    def __str__(self) -> str:
        """Return the table aligned to the right."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        lines = [self.headings, ["-" * width for width in widths], *self.rows]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join(f"| {' | '.join(_one_line(cell) for cell in line)} |" for line in lines)

    @classmethod
    def of_markdown(cls, text: str) -> Table:
        """Return the table that `markdown` has written.

        Example:
            >>> Table.of_markdown(Table({"rule": ["a | b", "c"]}).markdown()).rows
            [('a | b',), ('c',)]
        """
        lines = [_BETWEEN_CELLS.split(line.strip().removeprefix("| ").removesuffix(" |")) for line in text.splitlines()]
        headings, _, *rows = [[cell.replace("\\|", "|") for cell in line] for line in lines]
        return cls(dict(zip(headings, zip(*rows, strict=True), strict=True)))

    def _repr_html_(self) -> str:
        """Return the table as HTML, which notebooks show."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _one_line(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
