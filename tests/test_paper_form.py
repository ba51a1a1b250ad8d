"""LaTeX and Parquet of the verdict tables: every number in its place, no name a command; and what --where shows."""

from __future__ import annotations

import io
import re

import pandas as pd
import pytest
from verdict_tables import ARMS, heading, quickstart, trial

from orchestrator.cli.results import narrowed
from orchestrator.report import Results, tabulate, to_csv, to_latex, to_parquet
from orchestrator.sweep import UserError


def answer(**changes) -> Results:
    return tabulate(heading(**changes), quickstart())


def body(latex: str) -> list[list[str]]:
    """The cells of the table's rows, without the heading's."""
    inside = re.search(r"\\midrule\n(.*)\\bottomrule", latex, re.S)
    assert inside
    lines = [line for line in inside[1].splitlines() if line != r"\midrule"]
    return [[cell.strip() for cell in line.removesuffix(r" \\").split(" & ")] for line in lines]


def test_latex_holds_the_numbers_of_the_table() -> None:
    found = answer()
    (table,) = found.tables
    rows = body(to_latex(found))
    assert len(rows) == len(table.rows) == len(ARMS)
    for cells, row in zip(rows, table.rows, strict=True):
        assert len(cells) == 9
        assert cells[4] == rf"{row.loss_nats:.4f} $\pm$ {row.loss_sd_nats:.4f}"
        assert cells[5] == "2"
        assert cells[7] == ("-" if row.is_baseline else f"$[{row.low_nats:+.4f}, {row.high_nats:+.4f}]$")
    assert all(note.split()[0] in to_latex(found) for note in table.footnotes)


def test_environments_and_braces_are_balanced() -> None:
    latex = to_latex(answer())
    assert re.findall(r"\\begin\{(\w+)\}", latex) == ["table", "tabular", "minipage"]
    assert re.findall(r"\\end\{(\w+)\}", latex) == ["tabular", "minipage", "table"]
    plain = re.sub(r"\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize("name", ["100% \\input{/etc/passwd}", "a & b $x^2$ #1_2 ~", "{unbalanced"])
def test_no_name_is_a_command(name: str) -> None:
    arms = ("baseline", name)
    trials = [trial(arm, seed=seed, loss=2.4 + seed / 100) for arm in arms for seed in (1, 2)]
    found = tabulate(heading(arms=arms), trials)
    latex = to_latex(found)
    assert not re.search(r"(?<!\\)\\input", latex)
    assert len(body(latex)[1]) == 9
    plain = re.sub(r"\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}")


def test_parquet_holds_what_csv_holds() -> None:
    found = answer()
    frame = pd.read_parquet(io.BytesIO(to_parquet(found)))
    pd.testing.assert_frame_equal(frame, pd.read_csv(io.StringIO(to_csv(found))), check_dtype=False)
    assert frame["delta_nats"].dtype == float


def sizes() -> Results:
    trials = [
        trial(arm, seed=seed, loss=2.4 + size / 10 + seed / 100, axes={"train.tokens": 10**size})
        for arm in ARMS
        for seed in (1, 2)
        for size in (5, 6)
    ]
    given = heading()
    return tabulate(type(given)(**{**vars(given), "axis_names": ("train.lr", "train.tokens")}), trials)


def test_where_shows_a_part_and_computes_nothing_anew() -> None:
    found = sizes()
    assert len(found.tables) == 2
    part = narrowed(found, ["tokens=1e6", "arm=g1-headwise"])
    (table,) = part.tables
    assert dict(table.axes) == {"train.tokens": 1_000_000}
    assert [row.arm for row in table.rows] == ["baseline", "g1-headwise"]
    whole = next(one for one in found.tables if dict(one.axes) == {"train.tokens": 1_000_000})
    assert table.rows[1] == next(row for row in whole.rows if row.arm == "g1-headwise")
    assert "2 further arm(s)" in table.footnotes[-1]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("arm", "allowed: KEY=VALUE"),
        ("arm=g9", "no such value; allowed: baseline"),
        ("seed=1", "a key of arm"),
    ],
)
def test_where_names_what_is_allowed(condition: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        narrowed(sizes(), [condition])
