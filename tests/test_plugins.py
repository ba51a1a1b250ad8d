"""A mechanism out of another package: installed by its entry point, planned, trained, and held to what it says."""

import re
import subprocess
import sys

import plugins_here
import pytest
import ranks
from small_trials import metrics, new_attempt, summary_of, write_corpus

from models import accounting, plugins
from models.config import Layout
from models.presets import PRESETS
from orchestrator.plan import expand
from orchestrator.sweep import UserError, parse

SWEEP = """\
name: plugged
question: does LayerScale help?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 32, validation_every: 4, validation: {slice_bytes: 600, points: 2}}
  train: {tokens: 1280, batch_tokens: 256, lr: 3e-3}
baseline: baseline
arms:
  baseline: {}
  layer-scale: {model: {plugins: {layer-scale: {}}}}
seeds: [1]
"""
LATE = "arms.layer-scale.model.plugins.layer-scale.initial=0.5"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Where the example is installed; this process sees it."""
    folder = plugins_here.install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(folder))
    plugins_here.look_again()
    yield folder
    monkeypatch.undo()
    plugins_here.look_again()


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def planned(folder, *overrides, text=SWEEP):
    plan = expand(parse(text, folder / "x.yaml", overrides))
    return {trial.arm: trial for trial in plan.trials} | {refusal.arm: refusal for refusal in plan.refusals}


# -- planning -------------------------------------------------------------------------------------------------


def test_a_plan_has_the_options_the_source_and_the_parameters(site, folder):
    trials = planned(folder)
    config = trials["layer-scale"].config.model.plugins["layer-scale"]
    assert config.options == {"initial": 0.1}
    assert config.sha256 == plugins.source_sha256("layer-scale")
    assert trials["layer-scale"].num_parameters - trials["baseline"].num_parameters == 2 * 2 * 64
    assert "plugins" not in trials["baseline"].config.canonical_json()


def test_options_and_source_change_the_fingerprint(site, folder):
    first = planned(folder)["layer-scale"].fingerprint
    assert planned(folder)["layer-scale"].fingerprint == first
    assert planned(folder, LATE)["layer-scale"].fingerprint != first
    with (site / "layer_scale" / "scaled_add.py").open("a") as source:
        source.write("# another version\n")
    assert planned(folder)["layer-scale"].fingerprint != first


def test_options_may_be_an_axis_and_null_turns_a_plugin_off(site, folder):
    text = SWEEP.replace("preset: cpu-tiny", "preset: cpu-tiny, plugins: {layer-scale: {initial: 0.3}}")
    text = text.replace("baseline: {}", "baseline: {model: {plugins: {layer-scale: null}}}")
    trials = planned(folder, text=text)
    assert trials["layer-scale"].config.model.plugins["layer-scale"].options == {"initial": 0.3}
    assert trials["baseline"].config.model.plugins == {}
    axis = SWEEP.replace("  baseline: {}\n  layer-scale: {model: {plugins: {layer-scale: {}}}}", "  baseline: {}")
    plan = expand(parse(axis + "axes: {model.plugins.layer-scale.initial: [0.1, 0.2]}\n", folder / "x.yaml"))
    assert {trial.config.model.plugins["layer-scale"].options["initial"] for trial in plan.trials} == {0.1, 0.2}


MISTAKES = {
    "layer-skale: {}": "no plug-in 'layer-skale' is installed here; installed (entry points gatesweep.arms): layer-sc",
    "layer-scale: {initial: much}": "model.plugins.layer-scale.initial: got 'much'; allowed: a number",
    "layer-scale: {inital: 1.0}": "unknown key 'inital'; allowed: initial (did you mean 'initial'?)",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_at_their_line(site, folder, mistake):
    with pytest.raises(UserError, match=re.escape(MISTAKES[mistake])) as told:
        planned(folder, text=SWEEP.replace("layer-scale: {}}}", f"{mistake}}}}}"))
    assert "x.yaml:10:" in str(told.value)


def test_without_plugins_the_message_says_that_none_is_installed(folder):
    plugins_here.look_again()
    with pytest.raises(UserError, match=r"no plug-in 'layer-scale' is installed here; .*: none"):
        planned(folder)


def test_a_broken_plugin_harms_only_who_names_it(site, folder):
    (site / "layer_scale" / "__init__.py").write_text("import not_there\n")
    plugins_here.look_again()
    with pytest.raises(
        UserError, match=r"layer-scale \(layer_scale:LayerScale\) cannot be loaded: ModuleNotFoundError"
    ):
        planned(folder)
    unnamed = SWEEP.replace("{model: {plugins: {layer-scale: {}}}}", "{gate: {position: sdpa}}")
    assert planned(folder, text=unnamed)["layer-scale"].config.gates


def test_a_plugins_own_refusals_are_the_plans(site, folder):
    resources = "resources: {layout: {tensor: 2, sequence_parallel: true}}\n"
    refused = planned(folder, text=SWEEP + resources)["layer-scale"]
    assert refused.reason == "plug-in layer-scale: not with sequence parallelism"


def test_planning_with_a_plugin_loads_no_torch(site, folder):
    (folder / "x.yaml").write_text(SWEEP)
    code = (
        "import sys; from orchestrator.plan import expand; from orchestrator.sweep import load; "
        "print(len(expand(load('x.yaml')).trials), 'torch' in sys.modules)"
    )
    path = f"sys_path = {sys.path!r}; import sys; sys.path[:] = sys_path; "
    said = subprocess.run([sys.executable, "-c", path + code], cwd=folder, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["2", "False"]


# -- training -------------------------------------------------------------------------------------------------


def train_on_a_rank(rank, folder, home, layout, trial):
    from models.trainer import World, train

    world = World.join(rank, layout, "cpu", f"file://{folder}/meet")
    train(new_attempt(home, trial, layout=layout, diagnostics=None), world)


def test_a_plugged_trial_trains_alike_on_one_rank_and_on_two_tensor_ranks(world, site, folder):
    from models.trainer import train

    trial = planned(folder)["layer-scale"].config
    alone = new_attempt(folder / "one", trial, diagnostics=None)
    train(alone, world)
    ranks.run(train_on_a_rank, 2, folder / "two", Layout(tensor=2), trial)
    together = new_attempt(folder / "two", trial, layout=Layout(tensor=2))
    for ours, theirs in zip(metrics(together), metrics(alone), strict=True):
        assert ours["loss_nats"] == pytest.approx(theirs["loss_nats"], rel=2e-5)
    expected = accounting.parameters(trial.model, None, 256)
    assert expected == accounting.parameters(PRESETS["cpu-tiny"], None, 256) + 256
    assert summary_of(alone).num_parameters == summary_of(together).num_parameters == expected


def test_a_rank_refuses_another_version_than_the_planned(world, site, folder):
    from models.trainer import train

    trial = planned(folder)["layer-scale"].config
    with (site / "layer_scale" / "scaled_add.py").open("a") as source:
        source.write("# edited after planning\n")
    with pytest.raises(plugins.PluginError, match="plug-in layer-scale: its source here has sha256"):
        train(new_attempt(folder / "home", trial), world)


def test_parameters_that_are_counted_wrong_end_the_trial_at_its_start(world, site, folder):
    from models.trainer import train

    module = site / "layer_scale" / "__init__.py"
    module.write_text(module.read_text().replace("return 2 * model", "return 1 * model"))
    plugins_here.look_again()
    trial = planned(folder)["layer-scale"].config
    with pytest.raises(plugins.PluginError, match=r"plug-ins layer-scale: .* has 115,200: \+128 over 2 layers"):
        train(new_attempt(folder / "home", trial), world)
