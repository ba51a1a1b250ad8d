"""Reading a sweep file: the grammar, and one clear message with its place for each kind of mistake."""

# ruff: noqa: E501  (tables of messages, a line a mistake)

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.sweep import Derived, UserError, key_table, load, parse
from orchestrator.sweep.fields import KnownSection, config_fields, section_of
from orchestrator.sweep.settings import Settings

GOOD = """\
name: small
question: Does it help?
base:
  model: {preset: cpu-tiny}
  train:
    tokens: 1e6
    batch_tokens: 2048
baseline: baseline
arms:
  baseline: {}
  g1: {gate: {position: sdpa, granularity: headwise}}
axes:
  train.lr: [1e-3, 4e-3]
seeds: [1, 2]
controls: []
"""


def edited(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def refused(text, *overrides, said):
    """The message of the refusal, which holds ``said``."""
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse(text, "x.yaml", overrides)
    return str(caught.value)


def test_a_sweep_is_read_whole_and_in_file_order():
    sweep = parse(GOOD, "x.yaml")
    assert (sweep.name, sweep.question, sweep.baseline) == ("small", "Does it help?", "baseline")
    assert list(sweep.arms) == ["baseline", "g1"]
    assert sweep.arms["g1"] == {"gate": {"position": "sdpa", "granularity": "headwise"}}
    assert sweep.axes == {"train.lr": (1e-3, 4e-3)}
    assert sweep.seeds == (1, 2)
    assert sweep.text == GOOD
    assert sweep.match.by == "none"


def test_left_out_settings_have_their_defaults():
    sweep = parse(GOOD, "x.yaml")
    assert sweep.verdict.alpha == 0.05
    assert sweep.prune.divergence.patience_steps == 5
    assert (sweep.retry.infrastructure, sweep.retry.error) == (5, 0)
    assert sweep.resources.layout.world_size == 1
    assert sweep.budget.wall_hours is None


def test_a_sweep_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(GOOD, "x.yaml").name = "other"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e6", 1_000_000), ("2_000_000", 2_000_000), ("0x10", 16), ("1000000.0", 1_000_000), ("+4096", 4096)],
)
def test_integral_numbers_become_whole_ones(written, value):
    tokens = parse(edited("1e6", written), "x.yaml").base["train"]["tokens"]
    assert tokens == value
    assert type(tokens) is int


def test_yaml_1_2_scalars():
    assert parse(edited("1e-3, 4e-3", "3e-4, .5, 1"), "x.yaml").axes["train.lr"] == (3e-4, 0.5, 1)
    assert parse(edited("Does it help?", "no"), "x.yaml").question == "no"
    assert parse(edited("Does it help?", "1:30"), "x.yaml").question == "1:30"
    refused(edited("cpu-tiny}", "cpu-tiny, qk_norm: yes}"), said="got 'yes'; allowed: true or false")


def test_aliases_and_merge_keys_work():
    text = edited("preset: cpu-tiny", "preset: cpu-tiny, ffn_size: &width 2048").replace("2048\nbase", "*width\nbase")
    text = text.replace(
        "{gate: {position: sdpa, granularity: headwise}}",
        "{gate: &g1 {position: sdpa}}\n  g2: {gate: {<<: *g1, init: zero}}",
    )
    sweep = parse(text.replace("1e6", "*width"), "x.yaml")
    assert sweep.base["train"]["tokens"] == 2048
    assert sweep.arms["g2"] == {"gate": {"position": "sdpa", "init": "zero"}}


def test_match_takes_a_word_or_a_mapping():
    assert parse(GOOD + "match: parameters\n", "x.yaml").match.by == "parameters"
    sweep = parse(GOOD + "match: {by: flops, ffn_multiple: 64}\n", "x.yaml")
    assert (sweep.match.by, sweep.match.ffn_multiple) == ("flops", 64)
    assert parse(GOOD + "match: parameters\n", "x.yaml", ["match.ffn_multiple=8"]).match.ffn_multiple == 8


def test_zip_rows_exclude_and_derived_axes_are_read():
    text = GOOD + (
        "zip: [{train.tokens: [1e6, 2e6], train.beta2: [0.95, 0.99]}]\n"
        "rows: [{train.lr: 1e-2, train.weight_decay: 0}]\n"
        "exclude: [{arm: g1, train.lr: 4e-3}]\n"
    )
    sweep = parse(text.replace("[1e-3, 4e-3]", "[1e-3, 4e-3]\n  train.epsilon: {of: train.lr, times: 1e-5}"), "x.yaml")
    assert sweep.zip == ({"train.tokens": (1_000_000, 2_000_000), "train.beta2": (0.95, 0.99)},)
    assert sweep.rows == ({"train.lr": 1e-2, "train.weight_decay": 0},)
    assert sweep.exclude == ({"arm": "g1", "train.lr": 4e-3},)
    assert sweep.axes["train.epsilon"] == Derived(of="train.lr", times=1e-5)
    assert sweep.axis_names == ("train.lr", "train.epsilon", "train.tokens", "train.beta2", "train.weight_decay")


def test_an_arm_without_content_is_an_arm_that_changes_nothing():
    assert parse(edited("baseline: {}", "baseline:"), "x.yaml").arms["baseline"] == {}


def test_overrides_reach_base_settings_axes_and_arms():
    overrides = [
        "train.tokens=2e6",
        "verdict.margin=0.02",
        "axes.train.lr=[1e-2]",
        "arms.g1.gate.init=zero",
        "seeds=[7]",
    ]
    sweep = parse(GOOD, "x.yaml", overrides)
    assert sweep.base["train"]["tokens"] == 2_000_000
    assert sweep.verdict.margin == 0.02
    assert sweep.axes == {"train.lr": (1e-2,)}
    assert sweep.arms["g1"]["gate"]["init"] == "zero"
    assert sweep.seeds == (7,)
    assert sweep.overrides == tuple(overrides)
    assert sweep.text == GOOD


def test_an_override_can_take_the_gate_away_and_add_an_arm():
    sweep = parse(
        edited("  train:", "  gate: {position: value}\n  train:"),
        "x.yaml",
        ["gate=null", "arms.g2={gate: {position: key}}"],
    )
    assert sweep.base["gate"] is None
    assert sweep.arms["g2"] == {"gate": {"position": "key"}}


UNKNOWN = [
    ("batch_tokens: 2048", "batch_tokns: 2048", r"x.yaml:7:5: base.train.batch_tokns: unknown key 'batch_tokns'; allowed: tokens, batch_tokens, lr,"),
    ("batch_tokens: 2048", "batch_tokns: 2048", "(did you mean 'batch_tokens'?)"),
    ("cpu-tiny", "cpu-tny", "x.yaml:4:19: base.model.preset: got 'cpu-tny'; allowed: cpu-tiny, cpu-350k,"),
    ("cpu-tiny", "cpu-tny", "(did you mean 'cpu-tiny'?)"),
    ("baseline: baseline", "baseline: baselne", "x.yaml:8:11: baseline: got 'baselne'; allowed: baseline, g1 (did you mean 'baseline'?)"),
    ("baseline: baseline", "baseline: 3", "x.yaml:8:11: baseline: got 3; allowed: baseline, g1"),
    ("position: sdpa", "position: spda", "x.yaml:11:25: arms.g1.gate.position: got 'spda'; allowed: sdpa, value, key, query, dense (did you mean 'sdpa'?)"),
    ("train.lr: [1e-3", "train.rl: [1e-3", "x.yaml:13:3: axes.train.rl: unknown config path 'train.rl'; allowed: a path such as train.lr or model.preset (did you mean 'train.lr'?)"),
    ("train.lr: [1e-3", "lr: [1e-3", "(did you mean 'train.lr'?)"),
    ("train.lr: [1e-3", "train: [1e-3", "train is a section; allowed: one of its fields: train.tokens,"),
    ("preset: cpu-tiny", "preset: cpu-tiny, lr: 1", "x.yaml:4:29: base.model.lr: unknown key 'lr';"),
    ("preset: cpu-tiny", "preset: cpu-tiny, lr: 1", "(did you mean 'train.lr'?)"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nverdict: {look: 1}", "x.yaml:15:11: verdict.look: unknown key 'look'; allowed: margin, alpha, method, paired, tail, looks"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nseed: 3", "x.yaml:15:1: seed: "),
    ("seeds: [1, 2]", "seeds: [1, 2]\ntrain: {}", "(did you mean 'base.train'?)"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nexcludes: []", "(did you mean 'exclude'?)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), UNKNOWN)
def test_an_unknown_name_gives_the_place_what_is_allowed_and_the_nearest(old, new, said):
    refused(edited(old, new), said=said)


VALUES = [
    ("tokens: 1e6", "tokens: '1e6'", "x.yaml:6:13: base.train.tokens: got '1e6'; allowed: a whole number of at least 1"),
    ("tokens: 1e6", "tokens: 1.5", "got 1.5; allowed: a whole number"),
    ("tokens: 1e6", "tokens: true", "got true; allowed: a whole number"),
    ("tokens: 1e6", "tokens: null", "got null; allowed: a whole number"),
    ("tokens: 1e6", "tokens: [1]", "got a list; allowed: a whole number"),
    ("tokens: 1e6", "tokens: {a: 1}", "got a mapping; allowed: a whole number"),
    ("tokens: 1e6", "tokens: 1e300", "got 1e+300; allowed: a whole number"),
    ("tokens: 1e6", "tokens: .inf", "got inf; allowed: a whole number"),
    ("tokens: 1e6", "tokens: 1e6\n    warmup_fraction: 2", "got 2; allowed: a number from 0 to 1"),
    ("tokens: 1e6", "tokens: 1e6\n    epsilon: .nan", "got nan; allowed: a number above 0"),
    ("tokens: 1e6", "tokens: 2020-01-01", "x.yaml:6:13: base.train.tokens: got a date; allowed: mappings, lists,"),
    ("tokens: 1e6", "tokens: !big 3", "x.yaml:6:13: base.train.tokens: got a value with a tag; allowed:"),
    ("train.lr: [1e-3, 4e-3]", "train.lr: [1e-3, -1]", "x.yaml:13:20: axes.train.lr[1]: got -1; allowed: a number above 0"),
    ("train.lr: [1e-3, 4e-3]", "train.lr: []", "x.yaml:13:13: axes.train.lr: got an empty list; allowed: a list of values, each a number above 0"),
    ("train.lr: [1e-3, 4e-3]", "train.lr: 1e-3", "x.yaml:13:13: axes.train.lr: got 0.001; allowed: a list of values"),
    ("train.lr: [1e-3, 4e-3]", "train.lr: [1e-3, 0.001]", "x.yaml:13:20: axes.train.lr[1]: got 0.001 twice; allowed: every value once"),
    ("axes:\n  train.lr: [1e-3, 4e-3]", "axes: [1]", "x.yaml:12:7: axes: got a list; allowed: a mapping of config paths"),
    ("seeds: [1, 2]", "seeds: [1, 1]", "x.yaml:14:12: seeds[1]: got 1 twice; allowed: every seed once"),
    ("seeds: [1, 2]", "seeds: []", "x.yaml:14:8: seeds: got an empty list; allowed: a list of whole numbers"),
    ("seeds: [1, 2]", "seeds: {select: [1]}", "x.yaml:14:8: seeds: got the keys select; allowed: select and confirm"),
    ("seeds: [1, 2]", "seeds: [-1]", "got -1; allowed: a whole number from 0 to 2147483647"),
    ("name: small", "name: Small Sweep", "x.yaml:1:7: name: got 'Small Sweep'; allowed: lower-case letters, digits, - and _"),
    ("question: Does it help?", "question: ''", "x.yaml:2:11: question: got ''; allowed: text, not empty"),
    ("  g1: {", "  g.1: {", "x.yaml:11:3: arms.g.1: the arm's name: got 'g.1'; allowed: letters, digits, - and _"),
    ("  g1: {", "  g2: 3\n  g1: {", "x.yaml:11:7: arms.g2: got 3; allowed: a mapping with keys among model, gate, more_gates, data, train, precision"),
    ("gate: {position: sdpa, granularity: headwise}", "gate: {}", "x.yaml:11:14: arms.g1.gate: got an empty mapping; allowed:"),
    ("gate: {position: sdpa, granularity: headwise}", "seed: 3", "x.yaml:11:8: arms.g1.seed: the seed is no part of an arm"),
    ("train.lr: [", "seed: [", "axes.seed: the seed is no part of an arm or a cell"),
    ("  train:", "  data: {vocab_size: 3}\n  train:", "base.data.vocab_size: vocab_size is filled in by the plan"),
    ("baseline: {}", "baseline: {train: {lr: 1}}", "x.yaml:10:22: arms.baseline.train.lr: train.lr is also an axis (in axes), which would set it again"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nmatch: sizes", "x.yaml:15:8: match.by: got 'sizes'; allowed: none, parameters, flops"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nmatch: {ffn_multiple: 8}", "x.yaml:15:8: match: ffn_multiple needs by: parameters or by: flops"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nresources: {layout: {tensor: 0}}", "x.yaml:15:30: resources.layout.tensor: got 0; allowed: a whole number of at least 1"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nprune: {divergence: null}", "prune.divergence: got null; allowed: a mapping with keys among loss_above_start,"),
    ("seeds: [1, 2]", "seeds: [1, 2]\nprune: 1", "prune: got 1; allowed: a mapping with keys among divergence"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), VALUES)
def test_a_wrong_value_gives_the_place_what_was_got_and_what_is_allowed(old, new, said):
    refused(edited(old, new), said=said)


CELLS = [
    ("zip: [{train.tokens: [1, 2], train.beta1: [0.9]}]", "x.yaml:16:7: zip[0]: zipped axes must be of one length; train.tokens has 2, train.beta1 has 1"),
    ("zip: [{train.lr: [1, 2]}]", "zip[0].train.lr: varies already in axes; allowed: one place"),
    ("zip: [{train.beta1: [0.9]}, {train.beta1: [0.8]}]", "zip[1].train.beta1: varies already in zip[0]"),
    ("zip: [{train.beta1: [0.9, 0.9], train.beta2: [0.9, 0.9]}]", "zip[0]: the same values twice: train.beta1 0.9, train.beta2 0.9"),
    ("zip: [3]", "x.yaml:16:7: zip[0]: got 3; allowed: a mapping of config paths"),
    ("zip: {train.beta1: [1]}", "x.yaml:16:6: zip: got a mapping; allowed: a list of mappings"),
    ("rows: [{train.lr: abc}]", "x.yaml:16:19: rows[0].train.lr: got 'abc'; allowed: a number above 0"),
    ("rows: [{}]", "rows[0]: got an empty mapping; allowed: a mapping of config paths to values"),
    ("rows: [{train.lrr: 1}]", "rows[0].train.lrr: unknown config path 'train.lrr'"),
    ("exclude: [{arm: g2}]", "x.yaml:16:17: exclude[0].arm: got 'g2'; allowed: baseline, g1"),
    ("exclude: [{train.beta1: 0.5}]", "exclude[0].train.beta1: not an axis of this sweep; allowed: arm, train.lr"),
    ("exclude: [{train.lr: x}]", "exclude[0].train.lr: got 'x'; allowed: a number above 0"),
    ("exclude: [{}]", "exclude[0]: got an empty mapping; allowed: a mapping with keys among arm and the sweep's axes"),
    ("exclude: [g1]", "exclude[0]: got 'g1'; allowed: a mapping with keys among arm"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), CELLS)
def test_a_mistake_in_the_grammar_of_cells(line, said):
    refused(GOOD + line + "\n", said=said)


DERIVED = [
    ("{of: train.tokns, times: 2}", "of: got 'train.tokns'; allowed: a config path of a number (did you mean 'train.tokens'?)"),
    ("{of: gate.position, times: 2}", "of: got 'gate.position'; allowed: a config path of a number"),
    ("{of: [train.tokens], times: 2}", "of: got a list; allowed: a config path of a number"),
    ("{of: train.tokens, times: x}", "times: got 'x'; allowed: a number"),
    ("{of: train.tokens}", "a derived value has the keys of and times, and may have power; got of"),
    ("{of: train.tokens, times: 2, plus: 1}", "a derived value has the keys of and times, and may have power; got of, times, plus"),
    ("{of: train.tokens, times: 2, power: x}", "power: got 'x'; allowed: a number"),
    ("{of: train.tokens, times: [2]}", "times: got a list; allowed: a number"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "said"), DERIVED)
def test_a_derived_value_is_checked(value, said):
    refused(edited("2048", value), said=f"x.yaml:7:19: base.train.batch_tokens: {said}")


def test_an_axis_may_have_several_factors_of_one_rule():
    rule = "{{of: model.hidden_size, times: {}, power: -1}}"
    found = parse(edited("[1e-3, 4e-3]", rule.format("[0.5, 1]")), "x.yaml").axes["train.lr"]
    assert found == tuple(Derived(of="model.hidden_size", times=times, power=-1.0) for times in (0.5, 1.0))
    for times in ("[]", "[1, 1]"):
        refused(
            edited("[1e-3, 4e-3]", rule.format(times)),
            said=" list; allowed: a number, or a list of numbers, each once",
        )


def test_only_numbers_can_be_derived():
    text = edited("granularity: headwise", "granularity: {of: train.lr, times: 1}")
    refused(text, said="arms.g1.gate.granularity: got a derived value; allowed: elementwise, headwise")


@pytest.mark.parametrize("key", ["name", "question", "base", "baseline", "arms", "seeds"])
def test_a_missing_key_is_named(key):
    lines, kept, skipping = GOOD.splitlines(), [], False
    for line in lines:
        skipping = line.startswith(f"{key}:") or (skipping and line.startswith(" "))
        kept += [] if skipping else [line]
    refused("\n".join(kept), said=f"x.yaml:1:1: the sweep has no key {key}; a sweep needs name, question,")


BROKEN = [
    ("name: [1\n", "x.yaml:2:1: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
    ("name: a\nname: b\n", "x.yaml:2:1: not valid YAML: while constructing a mapping, found duplicate key \"name\""),
    ("base: {train: {lr: 1, lr: 2}}\n", "x.yaml:1:23: not valid YAML: while constructing a mapping, found duplicate key"),
    ("a: b: c\n", "x.yaml:1:5: not valid YAML: mapping values are not allowed here"),
    ("a: *nothing\n", "x.yaml:1:4: not valid YAML: found undefined alias"),
    ("a: 1\n---\nb: 2\n", "x.yaml:2:1: not valid YAML: expected a single document in the stream"),
    ("a: \x01\n", "x.yaml: not valid YAML: "),
    ("&all\nname: *all\n", "x.yaml:1:1: name: an alias that holds itself"),
    ("base: {1: 2}\n", "x.yaml:1:7: base: key 1 is not text; put it in quotes"),
    ("", "x.yaml:1:1: the file is empty"),
    ("# only words\n", "x.yaml:1:1: the file is empty"),
    ("- a\n", "x.yaml:1:1: the file holds a list; allowed: a mapping of keys"),
    ("only words\n", "x.yaml:1:1: the file holds only text; allowed: a mapping of keys"),
    ("a: " + "[" * 60 + "]" * 60, "x.yaml:1:54: nested deeper than 50 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_yaml_mapping_is_refused_with_its_line(text, said):
    refused(text, said=said)


OVERRIDES = [
    ("train.tokens=abc", "override train.tokens=abc: base.train.tokens: got 'abc'; allowed: a whole number"),
    ("train.tokns=3", "override train.tokns=3: base.train.tokns: unknown key 'tokns'"),
    ("trian.tokens=3", "override trian.tokens=3: trian: unknown key 'trian'; allowed: name,"),
    ("train.tokens", "override 'train.tokens': allowed: KEY=VALUE with a dotted key"),
    ("trian.tokens=3", "(did you mean 'base.train'?)"),
    ("=3", "allowed: KEY=VALUE"),
    ("train..tokens=3", "allowed: KEY=VALUE"),
    ("train.tokens=", "allowed: KEY=VALUE"),
    ("train.tokens=[1", "override 'train.tokens=[1':1:3: not valid YAML: while parsing a flow sequence"),
    ("train.tokens.more=1", "override 'train.tokens.more=1': base.train.tokens is 1000000.0, which has no key more; set it as a whole: base.train.tokens=..."),
    ("axes.train.lr=[1e-3,x]", "override axes.train.lr=[1e-3,x]: axes.train.lr[1]: got 'x'; allowed: a number above 0"),
    ("rows.0=3", "override rows.0=3: rows: got a mapping; allowed: a list of mappings"),
    ("baseline=g3", "override baseline=g3: baseline: got 'g3'; allowed: baseline, g1"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), OVERRIDES)
def test_a_mistake_in_an_override_names_the_override(override, said):
    refused(GOOD, override, said=said)


def test_all_mistakes_of_one_pass_are_listed_each_with_its_place():
    text = edited("tokens: 1e6", "tokens: x").replace("[1, 2]", "[a]")
    lines = refused(text, said="x.yaml:14:9: seeds[0]: got 'a'").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("x.yaml:6:13: base.train.tokens: got 'x'")


def test_a_very_long_list_of_mistakes_is_cut():
    text = GOOD + "".join(f"wrong{number}: 1\n" for number in range(30))
    assert len(refused(text, said="\nand 18 more").splitlines()) == 13


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"quickstat.yaml: no such file \(did you mean .*quickstart.yaml\?\)"):
        load(tmp_path / "quickstat.yaml")
    with pytest.raises(UserError, match=r"no such file$"):
        load(tmp_path / "nowhere" / "x.yaml")


def test_a_folder_is_no_sweep_file(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"got a folder; allowed: a sweep file \(a.yaml\)"):
        load(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"not UTF-8 text: .* at byte 6"):
        load(tmp_path / "x.yaml")


def test_load_keeps_the_absolute_path_and_names_the_file_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(GOOD)
    assert load("x.yaml").path == str(tmp_path / "x.yaml")
    Path("x.yaml").write_text(edited("cpu-tiny", "none"))
    with pytest.raises(UserError, match=r"^x.yaml:4:19: "):
        load("x.yaml")


def test_reading_a_sweep_loads_no_heavy_library():
    code = (
        "import sys, orchestrator.sweep, orchestrator.plan\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'sqlalchemy', 'scipy', 'pandas', 'numpy', 'tokenizers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_files_of_this_repository_are_read():
    folder = Path(__file__).parent.parent / "sweeps"
    paths = sorted(folder.rglob("*.yaml"))
    assert paths
    for path in paths:
        assert load(path).name == path.stem


def test_the_grammar_names_every_key_that_a_file_may_have():
    text = (Path(__file__).parent.parent / "sweeps" / "README.md").read_text()
    text = text.partition(key_table.BEGIN)[0]  # by hand; the tables behind it name every key by themselves
    of_the_file = [
        *config_fields(),
        *leaves(section_of(Settings)),
        "arms",
        "baseline",
        "axes",
        "zip",
        "rows",
        "exclude",
    ]
    written = set(re.findall(r"\w+", text))
    assert [path for path in of_the_file if path.rpartition(".")[2] not in written] == []


def leaves(section):
    for name, known in section.fields.items():
        yield from leaves(known) if isinstance(known, KnownSection) else [name]


def with_arms(number, more=""):
    arms = "".join(f"  g{i}: {{gate: {{position: sdpa, scale: {i}}}}}\n" for i in range(2, number + 1))
    return edited("axes:\n", arms + "axes:\n") + more


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        (with_arms(1), ()),  # sqrt(1) x 2
        (with_arms(4), (3, 4)),  # sqrt(4) x 2
        (with_arms(9), (3, 4, 5, 6)),
        (with_arms(4).replace("[1, 2]", "[2, 7, 1]"), (3, 4, 5)),
        (with_arms(4).replace("[1, 2]", "[1]"), ()),  # makes no verdict
        (with_arms(4, "verdict: {paired: true}\n"), ()),
        (with_arms(4, "baseline_seeds: 2\n"), ()),
        (with_arms(1, "baseline_seeds: 5\n"), (3, 4, 5)),
    ],
)
def test_the_baseline_gets_more_seeds_by_the_root_of_the_arms(text, extra):
    assert parse(text, "x.yaml").extra_baseline_seeds == extra


def test_with_more_seeds_the_baselines_only_ever_grow():
    text, before = with_arms(5), set()
    for count in range(2, 9):
        sweep = parse(text, "x.yaml", [f"seeds={[3 * i for i in range(1, count + 1)]}"])
        now = {*sweep.seeds, *sweep.extra_baseline_seeds}
        assert before <= now
        before = now


def test_confirming_seeds_that_begin_late_leave_the_earlier_ones_alone():
    seeds = ["axes={train.lr: [1e-3, 3e-3]}", "seeds={select: [1, 2], confirm: [9, 11]}"]
    assert parse(with_arms(4), "x.yaml", seeds).extra_baseline_seeds == (10, 12)


def test_baseline_seeds_and_verdict_methods_that_contradict_are_refused():
    refused(
        GOOD + "baseline_seeds: 1\n", said="x.yaml:16:17: baseline_seeds: got 1; allowed: at least the 2 of every arm"
    )
    paired = GOOD + "verdict: {paired: true}\n"
    refused(paired, "baseline_seeds=3", said="got 3; allowed with verdict.paired: 2, as a pair has two")
    refused(paired, "verdict.method=auto", said="method auto tests the arms' own variances")
    refused(GOOD + "verdict: {looks: 0}\n", said="verdict.looks: got 0")
    refused(GOOD + "verdict: {tail: 0}\n", said="verdict.tail: got 0")
