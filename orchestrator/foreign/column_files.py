"""Curves in columns: our own CSV, and what W&B and MLflow export, as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.foreign.points import CurveMaker, ForeignText
from orchestrator.store import ImportedCurve
from orchestrator.sweep import UserError

Row = tuple[int, Mapping[str, Any]]
"""With the line of the file, from 1."""


def read_csv(given: ForeignText) -> list[ImportedCurve]:
    """``step`` and ``loss`` or ``validation_loss`` (and the other usual names); ``seed``, ``tokens`` if there."""
    maker = CurveMaker(given, repeats=False)
    rows = list(_csv_rows(given))
    names = list(rows[0][1]) if rows else []
    if "step" not in names:
        raise UserError(f"{given.path}:1: no column step; got {', '.join(names) or '(nothing)'}")
    splits = given.splits(name for name in names if name not in ("step", "seed", "tokens"))
    for line, row in rows:
        step = given.whole(line, "step", row["step"])
        seed = given.whole(line, "seed", row["seed"]) if "seed" in row else None
        tokens = given.whole(line, "tokens", row["tokens"]) if row.get("tokens") else None
        for name, split in splits.items():
            if row[name] != "":
                loss = given.number(line, name, row[name])
                maker.add(line, split, step, loss, seed=seed, tokens=tokens)
    return maker.made()


def read_wandb(given: ForeignText) -> list[ImportedCurve]:
    """A run's history (``run.history()`` or ``scan_history``: CSV, JSON, JSON lines) with ``_step``; or a chart's CSV,
    with ``Step`` and a column ``RUN - METRIC`` a run; those that end in ``__MIN`` and ``__MAX`` are left out."""
    rows = list(_json_rows(given) if given.text.lstrip()[:1] in ("[", "{") else _csv_rows(given))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    maker = CurveMaker(given, repeats=False)
    if "_step" in names:
        splits = given.splits(name for name in names if name != "_step")
        columns = {name: ("", split) for name, split in splits.items()}
    else:
        charts = [name for name in names if " - " in name and not name.endswith(("__MIN", "__MAX"))]
        splits = given.splits(name.rpartition(" - ")[2] for name in charts)
        named = {name: name.rpartition(" - ") for name in charts}
        columns = {name: (run, splits[metric]) for name, (run, _, metric) in named.items() if metric in splits}
    at = "_step" if "_step" in names else "Step"
    for line, row in rows:
        for name, (run, split) in columns.items():
            if row.get(name) not in (None, ""):
                step = given.whole(line, at, row.get(at))
                maker.add(line, split, step, given.number(line, name, row[name]), run=run)
    return maker.made()


def read_mlflow(given: ForeignText) -> list[ImportedCurve]:
    """Points of metrics, ``key`` (in the UI's CSV ``metric``), ``value`` and ``step``, and ``run_id`` or ``Run`` if
    there: the UI's download, or what ``get_metric_history`` gives as JSON. A step that was logged again holds."""
    rows = list(_json_rows(given) if given.text.lstrip()[:1] in ("[", "{") else _csv_rows(given))
    maker = CurveMaker(given, repeats=True)
    points = []
    for line, row in rows:
        key = row.get("key", row.get("metric"))
        if key is None or "value" not in row or "step" not in row:
            got = ", ".join(row) or "(nothing)"
            raise UserError(f"{given.path}:{line}: got {got}; allowed: key (or metric), value and step")
        points.append((line, str(key), row))
    splits = given.splits(key for _, key, _ in points)
    for line, key, row in points:
        if key in splits:
            run = str(row.get("run_id", row.get("Run", "")))
            step = given.whole(line, "step", row["step"])
            maker.add(line, splits[key], step, given.number(line, key, row["value"]), run=run)
    return maker.made()


def _csv_rows(given: ForeignText) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(given.text), strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        if len(set(head)) < len(head):
            raise UserError(f"{given.path}:1: a column is named twice; got {', '.join(head)}")
        for values in reader:
            if len(values) != len(head) and values:
                said = f"got {len(values)} fields; allowed: {len(head)}, as in the first line"
                raise UserError(f"{given.path}:{reader.line_num}: {said}")
            if values:
                yield reader.line_num, dict(zip(head, map(str.strip, values), strict=True))
    except csv.Error as error:
        raise UserError(f"{given.path}:{reader.line_num}: no CSV: {error}") from None


def _json_rows(given: ForeignText) -> Iterator[Row]:
    """A list of objects, an object with one (``{"metrics": [...]}``), or an object a line."""
    try:
        whole = json.loads(given.text)
    except ValueError:
        yield from _json_lines(given)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise UserError(f"{given.path}: got JSON that is no list of objects; allowed: one a step, or one a point")
    yield from enumerate(whole, start=1)


def _json_lines(given: ForeignText) -> Iterator[Row]:
    for number, line in enumerate(given.text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{given.path}:{number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{given.path}:{number}: got {line[:40]!r}; allowed: a JSON object a line")
        yield number, row
