from __future__ import annotations

from lightning_flatness.reporting.tables import Table

TABLE = Table({"key": ["a|b", "c"], "value": ["1", "two\n<b>"]})


def test_one_table_in_three_forms() -> None:
    assert str(Table({"a": ["1", "22"], "bcd": ["x", ""]})).splitlines() == [
        " a  bcd",
        "--  ---",
        " 1    x",
        "22     ",
    ]
    assert TABLE.markdown().splitlines()[2:] == ["| a\\|b | 1 |", "| c | two <b> |"]
    assert "<td>two\n&lt;b&gt;</td>" in TABLE._repr_html_()
    assert str(Table({"empty": []})) == "empty\n-----"


def test_markdown_is_read_back() -> None:
    table = Table({"a": ["x | y", "", "\\|"], "b": ["", "", "2"], "c": ["", "z", ""]})
    again = Table.of_markdown(table.markdown())
    assert (again.headings, again.rows) == (table.headings, table.rows)
