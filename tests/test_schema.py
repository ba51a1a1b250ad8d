"""The JSON schema of sweep files takes what the reader takes, and is kept as it is made; so are the tables of keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import plugins_here
import pytest

from orchestrator.sweep import UserError, parse
from orchestrator.sweep.document import read_document
from orchestrator.sweep.fields import KnownSection, check_value, config_fields, section_of
from orchestrator.sweep.key_table import key_tables, with_key_tables
from orchestrator.sweep.schema import leaf, sweep_schema
from orchestrator.sweep.settings import Settings

SWEEPS = Path(__file__).parent.parent / "sweeps"
FILES = sorted(SWEEPS.rglob("*.yaml"))
QUICKSTART = (SWEEPS / "quickstart.yaml").read_text()
SCHEMA = sweep_schema(installed_plugins=False)
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)

VALUES = [None, True, "", "x", "sdpa", "cosine", -1, 0, 1, 2, 1.0, 0.5, 1.5, 1e6, 1e30, [], [1], ["x"], {}, {"x": 1}]


def problems(text):
    document, _ = read_document(text, "x.yaml")
    return [error.json_path for error in VALIDATOR.iter_errors(document)]


def settings_fields(section, prefix=""):
    for name, known in section.fields.items():
        if isinstance(known, KnownSection):
            yield from settings_fields(known, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", known


def test_the_schema_is_one_of_its_dialect_and_is_kept_as_it_is_made():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert json.loads((SWEEPS / "schema.json").read_text()) == SCHEMA, "run make schema"


def test_the_tables_of_keys_are_kept_as_they_are_made():
    text = (SWEEPS / "README.md").read_text()
    assert with_key_tables(text) == text, "run make schema"
    for name in (*config_fields(), *dict(settings_fields(section_of(Settings)))):
        assert f"| `{name}` |" in key_tables()
    with pytest.raises(ValueError, match="no lines <!-- keys"):
        with_key_tables("# Keys")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_sweep_names_the_schema_in_its_first_line_and_obeys_it(path):
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == SWEEPS / "schema.json"
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("name", [*config_fields(), *dict(settings_fields(section_of(Settings)))])
def test_a_single_value_is_taken_by_the_schema_just_when_the_reader_takes_it(name):
    known = (config_fields() | dict(settings_fields(section_of(Settings))))[name]
    validator = jsonschema.Draft7Validator(leaf(known))
    for value in VALUES:
        try:
            check_value(known, value)
            is_taken = True
        except ValueError:
            is_taken = False
        # What only code can tell: a number beyond the 64 bits of the store.
        if value == 1e30 and not is_taken:
            continue
        assert validator.is_valid(value) == is_taken, value


@pytest.mark.parametrize(
    "text",
    [
        "match: {by: flops, ffn_multiple: 64}",
        "prune: {rank: {seeds: 2}}",
        "resources: {by: [{where: {arm: g1-headwise, train.lr: 1e-3}, layout: {data: 2}}]}",
        "retry: {rules: [{cause: full, log: quota, counts_as: nothing}]}",
        "diagnostics: null",
        "exclude: [{arm: g1-headwise, train.lr: 4e-3}]",
        "axes: {train.lr: {search: [1e-4, 1e-1], trials: 4}}",
        "axes: {train.lr: {values: [1e-3, 2e-3], extend: 2}}",
        "axes: {data.sequence_length: [128, 256], train.tokens: {of: data.sequence_length, times: 80}}",
        "zip: [{model.num_layers: [2, 4], train.tokens: [81920, 163840]}]",
        "rows: [{train.weight_decay: 0}]",
        "seeds: {select: [1, 2], confirm: [3, 4]}",
        "arms: {baseline: , two: {gate: {position: sdpa}, more_gates: [{position: value}]}}",
        "base: {model: {preset: cpu-1m, plugins: {elsewhere: {option: 1}}}, train: {tokens: 1e6, batch_tokens: 2048}}",
    ],
)
def test_what_the_reader_takes_the_schema_takes(text):
    document, _ = read_document(QUICKSTART, "x.yaml")
    changed, _ = read_document(text, "x.yaml")
    assert [error.message for error in VALIDATOR.iter_errors(document | changed)] == []
    if "plugins" not in text:
        parse(json.dumps(document | changed), "x.yaml")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sedes: [1]", "$"),
        ("seeds: [1, 1]", "$.seeds"),
        ("match: parameter", "$.match"),
        ("axes: {train.lrs: [1e-3]}", "$.axes"),
        ("axes: {gate.position: {of: train.lr, times: 2}}", "$.axes"),
        ("axes: {train.lr: [1e-3, 1e-3]}", "$.axes"),
        ("rows: [{more_gates: []}]", "$.rows[0]"),
        ("arms: {baseline: {gates: null}}", "$.arms"),
        ("arms: {a.b: {}}", "$.arms"),
        ("resources: {by: [{gpus: 1}]}", "$.resources.by[0]"),
        ("resources: {layout: {tensor: 0}}", "$.resources.layout"),
        ("retry: {rules: [{log: x}]}", "$.retry.rules[0]"),
        ("seeds: {select: [1]}", "$.seeds"),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses(text, place):
    document, _ = read_document(QUICKSTART, "x.yaml")
    changed, _ = read_document(text, "x.yaml")
    found = [error.json_path for error in VALIDATOR.iter_errors(document | changed)]
    assert found
    assert all(one.startswith(place) for one in found)
    with pytest.raises(UserError, match=r"x\.yaml:"):
        parse(json.dumps(document | changed), "x.yaml")


def test_installed_plug_ins_bring_their_options(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(plugins_here.install(tmp_path)))
    plugins_here.look_again()
    try:
        model = sweep_schema()["definitions"]["config"]["properties"]["model"]["properties"]
        assert "layer-scale" in json.dumps(model["plugins"])
        assert sweep_schema(installed_plugins=False) == SCHEMA
    finally:
        monkeypatch.undo()
        plugins_here.look_again()


def gatesweep(*arguments, **environment):
    code = "from orchestrator.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_verb_writes_both(tmp_path):
    assert gatesweep("schema", "--no-plugins", "--out", str(tmp_path / "schema.json")).returncode == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == SCHEMA
    refused = gatesweep("schema", "--keys", "--out", str(tmp_path / "schema.json"))
    assert refused.returncode == 2
    assert "no lines <!-- keys" in refused.stderr


def test_a_shell_completes_verbs():
    done = gatesweep(_GATESWEEP_COMPLETE="complete_bash", COMP_WORDS="gatesweep re", COMP_CWORD="1")
    assert {"report", "rerun", "results", "reproduce"} <= set(done.stdout.split())
