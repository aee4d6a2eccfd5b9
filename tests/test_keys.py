"""The table of keys: what the documentation says, and what an evaluation yields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_flatness.keys import (
    FACTORS,
    HEADLINE,
    KERNEL,
    KEYS,
    LOGGER_GROUPS,
    Key,
    key_of,
    key_suffix,
    keys_of,
    logger_key,
    quantity,
)

PAGE = (Path(__file__).parents[1] / "docs" / "keys.md").read_text(encoding="utf-8")
ROWS = [re.split(r" \| ", line.strip("| ")) for line in PAGE.splitlines() if re.match(r"\| `(flatness|margin)/", line)]


def test_the_page_has_the_table() -> None:
    documented = [(row[0].strip("`"), *row[2:]) for row in ROWS]
    closed = ("pooled", "classifier")
    methods = {("pooled",): "pooled", closed: "both", (*closed, "jacobian"): "all"}
    expected = [(key.name, key.unit, key.direction, key.source, methods[key.methods]) for key in KEYS.values()]
    assert documented == expected


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_direction_in_words_is_the_one_that_rules_and_figures_use(key: Key) -> None:
    assert (key.better or "none") in key.direction
    assert key.methods


def test_factors_are_keys_and_keys_know_their_suffix() -> None:
    assert set(FACTORS) < set(keys_of("pooled")) == set(KEYS) == set(keys_of("auto"))
    assert set(keys_of("pooled")) - set(keys_of("classifier")) == {KERNEL}
    assert set(keys_of("jacobian")) < set(keys_of("classifier"))
    assert keys_of("no method") == ()
    assert [key_suffix(f"margin/mean{suffix}") for suffix in ("", "/a", "/a/b")] == ["", "/a", "/a/b"]


def test_loggers_have_the_headline_first_and_every_other_key_in_one_group() -> None:
    grouped = [key for keys in LOGGER_GROUPS.values() for key in keys]
    assert sorted([*grouped, *HEADLINE]) == sorted(KEYS)
    assert sorted(["flatness", "margin", *LOGGER_GROUPS])[:2] == ["flatness", "margin"]
    names = [logger_key(key) for key in KEYS]
    assert len(set(names)) == len(names)
    assert [logger_key(key) for key in HEADLINE] == list(HEADLINE)
    for group, keys in LOGGER_GROUPS.items():
        for key in keys:
            assert logger_key(f"{key}/train/dataloader_idx_1") == f"{group}/{key.split('/')[1]}/train/dataloader_idx_1"
            assert quantity(f"{key}/train/dataloader_idx_1") == key
            assert key_of(logger_key(f"{key}/train")) == f"{key}/train"
        assert f"| `{group}` | {', '.join(f'`{key}`' for key in keys)} |" in PAGE
    assert logger_key("own/key") == key_of("own/key") == "own/key"
    assert [key_of(key) for key in HEADLINE] == list(HEADLINE)
