"""Which back end a trial gets, and what is said when Transformer Engine is absent or broken."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_trials import corpus_trial, new_attempt, small_trial, summary_of, write_corpus

from models import run_dir
from models.config import TrialConfig

ROOT = Path(__file__).parents[1]
ABSENT = "it is not installed"
FP8 = TrialConfig.model_validate({**small_trial().model_dump(), "precision": "fp8"})


@pytest.fixture
def choose(monkeypatch):
    """``choose(problem, asked, device)``: what is taken where Transformer Engine has that problem."""
    from models import device as devices
    from models.layer_specs import choose_backend

    def with_problem(problem, asked, device, trial=None):
        monkeypatch.setattr(devices, "transformer_engine_problem", lambda: problem)
        return choose_backend(trial or small_trial(), asked, device)

    return with_problem


@pytest.mark.parametrize(
    ("problem", "asked", "device", "taken"),
    [
        (None, "auto", "cuda", "transformer_engine"),
        (None, "transformer_engine", "cuda", "transformer_engine"),
        (None, "local", "cuda", "local"),
        (None, "auto", "cpu", "local"),
        (ABSENT, "auto", "cuda", "local"),
        (ABSENT, "local", "cuda", "local"),
    ],
)
def test_auto_takes_transformer_engine_on_cuda_when_it_is_there(choose, problem, asked, device, taken):
    assert choose(problem, asked, device) == taken


def test_transformer_engine_that_is_asked_for_and_absent_is_one_message_with_the_mend(choose):
    said = r"`import transformer_engine.pytorch` failed: it is not installed; install it beside a CUDA build of torch"
    with pytest.raises(RuntimeError, match=said):
        choose(ABSENT, "transformer_engine", "cuda")


def test_transformer_engine_on_a_cpu_is_refused(choose):
    with pytest.raises(RuntimeError, match="needs a CUDA device, and this attempt runs on cpu"):
        choose(None, "transformer_engine", "cpu")


def test_fp8_without_transformer_engine_is_refused(choose):
    assert choose(None, "auto", "cuda", FP8) == "transformer_engine"
    for problem, asked, said in ((ABSENT, "auto", ABSENT), (None, "local", "backend local on cuda")):
        with pytest.raises(RuntimeError, match=f"precision fp8 needs Transformer Engine, and .*{said}"):
            choose(problem, asked, "cuda", FP8)


def in_a_process(folder, code):
    """What ``code`` printed, in a process that finds ``folder`` first."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    environment = {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_broken_transformer_engine_does_not_break_megatron_and_is_named(tmp_path):
    """As the plain wheel beside a CPU build of torch: its import raises RuntimeError, which Megatron does not catch."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "common.py").write_text("")
    (package / "__init__.py").write_text("from . import common\nraise RuntimeError('found an empty\\npackage')\n")
    printed = in_a_process(
        tmp_path,
        """
        import logging, sys
        logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
        import models.attention
        from megatron.core.transformer.transformer_block import HAVE_TE
        from models import device, layer_specs
        from small_trials import small_trial
        taken = layer_specs.choose_backend(small_trial(), "auto", "cuda")
        print(HAVE_TE, device.transformer_engine_problem(), taken, sep=", ")
        """,
    )
    problem = "RuntimeError: found an empty package"
    assert (
        f"WARNING Transformer Engine is installed but cannot be imported, and is taken for absent: {problem}" in printed
    )
    assert printed.splitlines()[-1] == f"False, {problem}, local"


def test_an_absent_transformer_engine_is_nothing_to_warn_of(tmp_path):
    printed = in_a_process(
        tmp_path,
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        from models import device
        print(device.transformer_engine_problem())
        """,
    )
    assert printed == f"{ABSENT}\n"


def test_the_attempts_summary_and_log_name_the_back_end(world, tmp_path):
    from models.trainer import train

    spec = new_attempt(tmp_path, corpus_trial(write_corpus(tmp_path / "corpus.jsonl"), steps=1))
    train(spec, world)
    assert summary_of(spec).backend == "local"
    assert "backend local, precision fp32" in run_dir.log_tail(spec.attempt_dir)
