"""The run dir: the data interface between training and control. What is written where, and how it is read.

    <home>/trials/<fingerprint>/
      config.json                    the resolved TrialConfig
      copied.json                    where its last checkpoint was copied to (orchestrator.copies)
      attempts/<number>-<token>/     one attempt writes only here
        attempt.json                 what the controller asked for (AttemptSpec)
        metrics.jsonl                one record a line: steps, validations and diagnostics, in order
        log-rank<r>.txt              what a rank said
        log-rank<r>.jsonl            the same as JSON lines, where they are asked for
        stacks-rank<r>.txt           what it was doing, when the attempt hung
        checkpoints/step_<n>/        complete once it has this name; written aside before, while training goes on
        summary.json                 how the attempt ended, by its own account; written last, atomically, when the
                                     last checkpoint stands

Non-finite numbers are written as null, with ``nonfinite`` saying so: a missing number is never 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from models.config import Backend, DiagnosticsConfig, Layout, TrialConfig


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepRecord(_Line):
    """One optimizer step. ``loss_nats`` is the mean over the batch's tokens, before the update."""

    kind: Literal["step"] = "step"
    step: int
    tokens: int
    fraction: float
    """Share of the schedule done after this step, 0 to 1."""
    lr: float
    loss_nats: float | None
    gradient_norm: float | None
    tokens_per_second: float
    nonfinite: bool = False


class ValidationRecord(_Line):
    """One evaluation: mean nats a token, and bits a byte of text, after ``step`` optimizer steps."""

    kind: Literal["validation"] = "validation"
    step: int
    tokens: int
    fraction: float
    split: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,14}(/full)?$")]
    """``slice`` or ``full`` of the corpus's own validation split; ``NAME`` or ``NAME/full`` of a validation set."""
    loss_nats: float | None
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int
    nonfinite: bool = False


Layers = list[float | None]
"""One number a layer, first layer first; None where it is not finite, or where the layer has nothing to measure."""

SPARSITY_THRESHOLDS = (0.1, 0.5)
"""A gate score below one of these counts as closed; of scores that may be negative, the size counts."""


class GateScores(_Line):
    """The scores of the gates at one position, over all heads, channels and tokens of the probe."""

    mean: Layers
    share_below: dict[str, Layers]
    """By threshold (the keys are SPARSITY_THRESHOLDS as text), the share of scores below it."""
    low: float
    high: float
    """Ends of the histogram; scores beyond them are counted in the outermost bins."""
    histogram: list[list[float] | None]
    """By layer, the share of scores in each of equally wide bins."""


class LayerDiagnostics(_Line):
    """What one forward pass over a few sequences shows, by layer. ``models.diagnostics.probe`` measures it."""

    first_token_attention: list[Layers]
    """[layer][head]: mean attention probability on key 0, over the queries from 1 on (query 0 sees nothing else)."""
    max_activation: Layers
    """The largest absolute value in the residual stream after the layer."""
    attention_output_rms: Layers
    ffn_output_rms: Layers
    """Root mean square of an element of what attention and FFN give out, before a sandwich norm."""
    residual_rms: Layers
    """The same of the residual stream after the layer."""
    gate_scores: dict[str, GateScores] = {}
    """By gate position; empty without a gate. Gates with ``input: constant`` have no scores."""
    nonfinite: bool = False


class DiagnosticRecord(LayerDiagnostics):
    """The probe after ``step`` optimizer steps, with what that step did to each layer's parameters."""

    kind: Literal["diagnostics"] = "diagnostics"
    step: int
    tokens: int
    fraction: float
    gradient_norm: Layers
    """Before clipping."""
    update_ratio: Layers
    """Norm of the step's change of the layer's parameters, over the norm of the parameters before it."""


Record = Annotated[StepRecord | ValidationRecord | DiagnosticRecord, Field(discriminator="kind")]
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


class AttemptSpec(_Line):
    """What the controller asks of a gang. Paths are absolute, on a file system that all ranks share."""

    fingerprint: str
    number: int
    token: str
    trial_dir: str
    data_dir: str
    """Where the prepared corpora are kept."""
    layout: Layout = Layout()
    micro_batch_sequences: int | None = None
    """Sequences a rank takes at once; None: its whole share of the batch."""
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Backend = "auto"
    resume_checkpoint: str | None = None
    resume_step: int = 0
    checkpoint_every_steps: int | None = None
    keep_checkpoints: int = Field(default=2, ge=1)
    final_checkpoint: bool = False
    """One more at the end of the schedule: what a finished trial is exported and measured from."""
    branch_steps: tuple[int, ...] = ()
    """More checkpoints after these steps, beside those that are kept: other trials may begin there."""
    threads_per_rank: int = 1
    diagnostics: DiagnosticsConfig | None = DiagnosticsConfig()
    log_labels: dict[str, str] | None = None
    """With labels (the sweep's name) ranks also write their log as JSON lines; None: only as text."""

    @property
    def attempt_dir(self) -> Path:
        return Path(self.trial_dir) / "attempts" / f"{self.number:03d}-{self.token}"


class Summary(_Line):
    """How an attempt ended, as rank 0 saw it. An attempt without one was killed."""

    outcome: Literal["complete", "stopped", "nonfinite", "error"]
    step: int
    resume_step: int
    seconds: float
    tokens_per_second: float | None
    """Median over this attempt's steps: the first ones warm up. Validation and checkpoints are not counted."""
    peak_memory_bytes: int | None = None
    num_parameters: int | None = None
    backend: Literal["local", "transformer_engine"] | None = None
    """What was taken; None: the attempt did not come so far."""
    error: str | None = None
    """Exception class and message, for outcome ``error``; for ``stopped``, why a gang stopped by itself."""


def trial_dir(home: Path, fingerprint: str) -> Path:
    return home / "trials" / fingerprint


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_json(path: Path, content: BaseModel | dict[str, Any]) -> None:
    """Write aside, then rename: a reader sees the whole file or none."""
    text = content.model_dump_json(indent=2) if isinstance(content, BaseModel) else json.dumps(content, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text + "\n")
    aside.replace(path)


def write_trial_config(directory: Path, config: TrialConfig) -> None:
    write_json(directory / "config.json", config)


def read_trial_config(directory: Path) -> TrialConfig:
    return TrialConfig.model_validate_json((directory / "config.json").read_text())


def read_attempt_spec(attempt_dir: Path) -> AttemptSpec:
    return AttemptSpec.model_validate_json((attempt_dir / "attempt.json").read_text())


def read_summary(attempt_dir: Path) -> Summary | None:
    """The attempt's own account of its end, or None when it has not ended by itself."""
    path = attempt_dir / "summary.json"
    return Summary.model_validate_json(path.read_text()) if path.exists() else None


def metrics_path(attempt_dir: Path) -> Path:
    return attempt_dir / "metrics.jsonl"


def log_path(attempt_dir: Path, rank: int) -> Path:
    return attempt_dir / f"log-rank{rank}.txt"


def json_log_path(attempt_dir: Path, rank: int) -> Path:
    return attempt_dir / f"log-rank{rank}.jsonl"


def stacks_path(attempt_dir: Path, rank: int) -> Path:
    return attempt_dir / f"stacks-rank{rank}.txt"


def record_line(record: Record) -> str:
    return record.model_dump_json() + "\n"


def read_records(attempt_dir: Path, offset: int = 0) -> tuple[list[Record], int]:
    """Records from byte ``offset`` on, and the offset to go on from. A torn last line is left for later."""
    path = metrics_path(attempt_dir)
    if not path.exists():
        return [], offset
    with path.open("rb") as stream:
        stream.seek(offset)
        chunk = stream.read()
    whole = chunk[: chunk.rfind(b"\n") + 1]
    records = [_RECORD.validate_json(line) for line in whole.splitlines() if line.strip()]
    return records, offset + len(whole)


def checkpoint_path(attempt_dir: Path, step: int) -> Path:
    return attempt_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(attempt_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of the attempt's complete checkpoints, newest first."""
    folder = attempt_dir / "checkpoints"
    paths = sorted(folder.glob("step_" + "[0-9]" * 8), reverse=True) if folder.exists() else []
    for path in paths:
        yield int(path.name.removeprefix("step_")), path


def _attempt_specs(trial_dir: Path) -> list[AttemptSpec]:
    return [read_attempt_spec(path.parent) for path in (trial_dir / "attempts").glob("[0-9]*-*/attempt.json")]


def resumed_checkpoints(trial_dir: Path) -> set[Path]:
    """Those that attempts of the trial were told to go on from."""
    specs = _attempt_specs(trial_dir)
    return {Path(spec.resume_checkpoint) for spec in specs if spec.resume_checkpoint is not None}


def branch_checkpoints(trial_dir: Path) -> set[Path]:
    """Those that attempts of the trial were told to write for other trials, be they there or not."""
    return {checkpoint_path(spec.attempt_dir, step) for spec in _attempt_specs(trial_dir) for step in spec.branch_steps}


def visible_checkpoints(trial_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of all complete checkpoints of a trial, the newest attempt's first.

    Not one that an attempt wrote after its successor had branched off: that is nobody's history.
    """
    visible = math.inf
    for folder in sorted((trial_dir / "attempts").glob("[0-9]*-*"), reverse=True):
        if (folder / "attempt.json").exists():
            yield from ((step, path) for step, path in complete_checkpoints(folder) if step <= visible)
            visible = min(visible, read_attempt_spec(folder).resume_step)


def latest_checkpoint(trial_dir: Path) -> tuple[int, Path] | None:
    """(step, path) of the furthest complete checkpoint of a trial; of equal ones the newest attempt's."""
    return max(visible_checkpoints(trial_dir), key=lambda one: one[0], default=None)


def log_tail(attempt_dir: Path, rank: int = 0, num_lines: int = 20, num_bytes: int = 16_384) -> str:
    """The last lines of a rank's log, bounded; empty when it said nothing."""
    path = log_path(attempt_dir, rank)
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - num_bytes))
        text = stream.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-num_lines:])
