"""Every renderer's numbers."""

import csv
import io
import json
import re

import pytest
from store_backends import postgres_server, store_url  # noqa: F401
from verdict_tables import QUESTION, failed, heading, quickstart

from orchestrator.report import (
    tabulate,
    to_csv,
    to_json,
    to_markdown,
    to_text,
)


def test_the_quick_starts_table_fits_120_columns_and_shows_every_number():
    answer = tabulate(heading(), quickstart())
    text = to_text(answer, 120)
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[0] == f"quickstart: {QUESTION}"
    assert text.splitlines()[3].split() == [
        "#",
        "arm",
        "LR",
        "nats",
        "perplexity",
        "[interval]",
        "params",
        "/s",
        "trials",
        "at",
        "LR",
        "verdict",
    ]
    for row in answer.tables[0].rows:
        assert f"{row.loss_nats:.4f}" in text
        assert f"±{row.loss_sd_nats:.4f}" in text
        assert f"{row.num_parameters:,}" in text
    for row in answer.tables[0].rows[1:]:
        assert f"{row.delta_nats:+.4f}" in text
        assert f"[{row.low_nats:+.4f}, {row.high_nats:+.4f}]" in text


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40])
def test_no_width_cuts_a_number(width):
    answer = tabulate(heading(), quickstart())
    text = to_text(answer, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in answer.tables[0].rows:
        wanted = [f"{row.loss_nats:.4f}", f"{row.bits_per_byte:.4f}", f"{row.num_parameters:,}", row.arm]
        wanted += [] if row.is_baseline else [f"[{row.low_nats:+.4f},", f"{row.high_nats:+.4f}]"]
        assert [word for word in wanted if word not in text.replace("\n", " ").split() and word not in text] == []


def test_names_are_never_read_as_markup():
    trials = [t._replace(arm="[red]gated[/red]") if t.arm == "g1-headwise" else t for t in quickstart()]
    names = tuple(dict.fromkeys(t.arm for t in trials))
    for width in (120, 60):
        assert "[red]gated[/red]" in to_text(tabulate(heading(arms=names), trials), width)


def test_csv_gives_back_every_number_unrounded():
    answer = tabulate(heading(), failed(quickstart(), "g1-headwise", 1e-3, 2))
    lines = list(csv.DictReader(io.StringIO(to_csv(answer))))
    assert len(lines) == 4
    for line, row in zip(lines, answer.tables[0].rows, strict=True):
        for name in (
            "best_lr",
            "loss_nats",
            "loss_sd_nats",
            "bits_per_byte",
            "delta_nats",
            "low_nats",
            "high_nats",
            "rank",
        ):
            value = getattr(row, name)
            assert line[name] == "" if value is None else float(line[name]) == value
        assert (line["verdict"], line["arm"], line["exploratory"]) == (row.verdict, row.arm, "true")
        assert int(line["num_failed"]) == row.counts.get("FAILED", 0)
        assert int(line["num_diverged"]) == 2


def test_json_gives_back_every_number_with_its_formula_and_its_trials():
    answer = tabulate(heading(), quickstart())
    content = json.loads(to_json(answer))
    table = content["tables"][0]
    known = {t["fingerprint"] for t in content["trials"]}
    assert len(known) == 24
    for line, row in zip(table["rows"], answer.tables[0].rows, strict=True):
        assert tuple(line["losses_nats"]) == row.losses_nats
        for name, cell in line.items():
            if isinstance(cell, dict) and "formula" in cell:
                assert cell["value"] == getattr(row, name)
                assert re.fullmatch(r"[a-z-]+-\d+", cell["formula"])
                assert set(cell["trials"]) <= known
        assert line["loss_nats"]["trials"] == [f"{row.arm}/0.004/{seed}" for seed in (1, 2)]
        assert len(line["best_lr"]["trials"]) == 6
        assert len(line["low_nats"]["trials"]) == 8
    assert table["rows"][1]["delta_nats"]["trials"] == [
        *table["rows"][0]["loss_nats"]["trials"],
        *table["rows"][1]["loss_nats"]["trials"],
    ]
    assert table["noise_floor"]["sd_nats"]["value"] == answer.tables[0].noise_floor.sd_nats


def test_json_and_csv_say_nothing_where_there_is_nothing():
    answer = tabulate(heading(), [t._replace(state="WAITING", slice_loss_nats=None) for t in quickstart()])
    content = json.loads(to_json(answer))
    assert content["tables"][0]["rows"][0]["loss_nats"]["value"] is None
    assert content["tables"][0]["noise_floor"] == {}
    assert next(csv.DictReader(io.StringIO(to_csv(answer))))["loss_nats"] == ""


def test_output_is_deterministic():
    first, second = (tabulate(heading(), quickstart()) for _ in range(2))
    for render in (to_text, to_csv, to_json, to_markdown):
        assert render(first) == render(second)


def test_markdown_is_one_table_whose_cells_cannot_break_out():
    trials = [t._replace(arm="a|b_*") if t.arm == "g1-headwise" else t for t in quickstart()]
    text = to_markdown(tabulate(heading(arms=tuple(dict.fromkeys(t.arm for t in trials))), trials))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {13}
    assert r"a\|b\_\*" in text
