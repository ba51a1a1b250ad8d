"""``gatesweep export`` and ``diagnose`` on a trained trial: each is a process of its own, as users run it.

What is measured of an exported folder must be what the trial's own validation said.
"""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from small_trials import corpus_trial, new_attempt, small_trial, write_corpus

from models import run_dir
from models.config import GateConfig, TrialConfig
from models.export import FORMS
from models.presets import PRESETS
from orchestrator import report
from orchestrator.cli.trained import ExportFormat


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """(home, attempt) of a finished trial with a headwise gate."""
    from models.trainer import train

    home = tmp_path_factory.mktemp("home")
    trial = corpus_trial(write_corpus(home / "corpus.jsonl"), GateConfig(position="sdpa", granularity="headwise"))
    validation = trial.data.validation.model_copy(update={"full_at_end": True})
    trial = trial.model_copy(update={"data": trial.data.model_copy(update={"validation": validation})})
    spec = new_attempt(home, trial, final_checkpoint=True)
    assert train(spec, world).outcome == "complete"
    return home, spec


@pytest.fixture
def gatesweep(trained, monkeypatch, capfd):
    """The command: (exit code, stdout, stderr), the child's own included."""
    from orchestrator import cli

    home, _ = trained
    monkeypatch.setenv("GATESWEEP_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["gatesweep", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def test_an_exported_trial_measures_as_it_validated(trained, gatesweep, tmp_path, monkeypatch):
    home, spec = trained
    validated = run_dir.read_records(spec.attempt_dir)[0][-1]
    assert validated.kind == "validation"
    # A folder called models in the working folder is not what is run.
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the wrong models')")
    monkeypatch.chdir(tmp_path)

    code, out, err = gatesweep("export", spec.fingerprint[:5], "--format", "released", "--to", "out/model")
    assert (code, err) == (0, "")
    assert f"trial {spec.fingerprint} at step 5, format released" in out
    provenance = json.loads((tmp_path / "out" / "model" / "gatesweep.json").read_text())
    assert (provenance["fingerprint"], provenance["step"]) == (spec.fingerprint, 5)

    code, out, err = gatesweep("diagnose", spec.fingerprint, "--full", "--format", "json")
    assert (code, err) == (0, "")
    of_trial = json.loads(out)
    measured = ("loss_nats", "bits_per_byte", "num_tokens", "num_bytes")
    assert [of_trial[name] for name in measured] == pytest.approx([getattr(validated, n) for n in measured], rel=1e-6)

    corpus = ("--corpus", home / "corpus.jsonl", "--validation-every", 4)
    code, out, err = gatesweep("diagnose", "out/model", *corpus, "--full", "--format", "json")
    assert (code, err) == (0, "")
    of_folder = json.loads(out)
    assert of_folder["loss_nats"] == pytest.approx(of_trial["loss_nats"], rel=1e-6)
    same = ("num_parameters", "model", "gates", "sequence_length", "num_bytes", "probe_sequences")
    assert {name: of_folder[name] for name in same} == {name: of_trial[name] for name in same}
    for name in ("first_token_attention", "max_activation"):
        found, expected = (np.array(one["diagnostics"][name]) for one in (of_folder, of_trial))
        assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < of_trial["diagnostics"]["gate_scores"]["sdpa"]["mean"][0] < 1


def test_what_cannot_be_exported_or_measured_is_one_line_and_changes_nothing(trained, tmp_path, capsys):
    from models.verbs.__main__ import main

    home, spec = trained
    trial, data = home / "trials" / spec.fingerprint, ("--out", str(tmp_path / "x"), "--data-dir", str(tmp_path / "y"))
    for arguments, said in [
        (("export", str(trial), "--format", "qwen3", "--to", str(tmp_path / "z")), "format qwen3 cannot express this"),
        (("export", str(home), "--format", "qwen3", "--to", str(tmp_path / "z")), "has no checkpoint"),
        (("diagnose", "--folder", str(tmp_path), *data), "has no config.json"),
        (("diagnose", "--trial", str(trial), "--tokenizer", "bytes", *data), "with its own tokenizer"),
    ]:
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert said in captured.err
        assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_torn_checkpoint_is_refused_by_name(trained, world, tmp_path):
    import shutil

    from models import device, export
    from models.verbs import one_rank

    _, spec = trained
    found = one_rank.newest_checkpoint(run_dir.trial_dir(trained[0], spec.fingerprint))
    copy = shutil.copytree(found.path, tmp_path / "torn")
    (copy / "common.pt").unlink()
    with device.on("cpu"), pytest.raises(export.Refused, match=r"torn is torn: common\.pt is missing$"):
        one_rank.restored(one_rank.Checkpoint(found.trial, found.step, copy), world)


def test_a_trial_is_found_by_the_beginning_of_its_fingerprint(trained, gatesweep, tmp_path):
    home, spec = trained
    other = home / "trials" / (spec.fingerprint[:4] + "zzzz")
    other.mkdir()
    try:
        code, _, err = gatesweep("export", spec.fingerprint[:4], "--format", "released", "--to", tmp_path / "out")
        assert code == 2
        assert f"2 trials begin with '{spec.fingerprint[:4]}'" in err
    finally:
        other.rmdir()
    code, _, err = gatesweep("diagnose", "nowhere")
    assert code == 2
    assert "begins with 'nowhere'" in err


@pytest.mark.parametrize(
    ("trained", "bf16", "read"),
    [
        ("fp32", True, "fp32"),
        ("bf16", True, "bf16"),
        ("bf16", False, "fp32"),
        ("fp8", True, "bf16"),
        ("fp8", False, "fp32"),
    ],
)
def test_weights_are_read_in_a_precision_that_any_machine_has(trained, bf16, read):
    from models.verbs.one_rank import in_plain_precision

    trial = TrialConfig.model_validate(small_trial().model_dump() | {"precision": trained})
    assert (trial.fp8 is not None) == (trained == "fp8")
    plain = in_plain_precision(trial, bf16=bf16)
    assert (plain.precision, plain.fp8) == (read, None)


def test_the_table_has_a_row_a_layer_and_what_the_papers_table_gives():
    """F-Attn is the mean over heads and layers; a number that is missing is not averaged away."""
    measured = {
        "folder": "somewhere",
        "format": "qwen3",
        "stored_dtype": "bfloat16",
        "model": PRESETS["cpu-moe-tiny"].model_dump(mode="json"),
        "gates": [],
        "num_parameters": 1234567,
        "corpus": "sotu",
        "split": "slice",
        "sequence_length": 64,
        "loss_nats": 1.25,
        "bits_per_byte": None,
        "num_tokens": 1000,
        "num_bytes": 4000,
        "probe_sequences": 3,
        "notes": ["a key was left out"],
        "diagnostics": {
            "first_token_attention": [[0.1, 0.3], [0.4, 0.6]],
            "max_activation": [100.0, 1900.0],
            "attention_output_rms": [1.0, None],
            "ffn_output_rms": [1.0, 2.0],
            "residual_rms": [1.0, 2.0],
            "gate_scores": {"sdpa": {"mean": [0.25, 0.75]}},
        },
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.measured_table(measured))
    lines = console.export_text().splitlines()
    said = {line.split("  ")[0]: line for line in lines}
    assert "(qwen3, bfloat16)" in said["folder"]
    assert "8 experts, top 2" in said["model"]
    assert said["gates"].endswith("none")
    assert said["bits/byte"].endswith(" -")
    assert lines[-1] == "note: a key was left out"
    rows = [line.split() for line in lines if line.split()[:1] in (["1"], ["2"], ["mean"])]
    assert rows[0] == ["1", "0.200", "100", "0.250", "1.000", "1.000", "1.000"]
    assert rows[2] == ["mean", "0.350", "1,000", "0.500", "-", "1.500", "1.500"]


def test_the_command_line_offers_the_forms_there_are():
    assert tuple(ExportFormat) == FORMS
