"""A trial's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from models import export
from models.config import DataConfig
from models.corpus.tokens import load_tokenizer, tokenizer_path, tokenizer_sha256
from models.verbs.one_rank import newest_checkpoint, one_rank, restored


def export_trial(trial_dir: Path, form: export.Form, to: Path) -> str:
    """Write the newest checkpoint of ``trial_dir`` to ``to``; returns what to tell the user.

    Raises Refused before anything heavy when ``form`` cannot express the trial.
    """
    found = newest_checkpoint(trial_dir)
    trial = found.trial
    tokenizer = load_tokenizer(trial.data.tokenizer)
    architecture = export.architecture_of(trial, form, separator=tokenizer.eod)
    files = _tokenizer_files(trial.data)
    with one_rank("cpu") as world:
        export.write_folder(
            to,
            architecture,
            restored(found, world, as_stored=True),
            tokenizer=files,
            provenance={
                "fingerprint": trial_dir.name,
                "step": found.step,
                "steps_planned": trial.train.num_steps,
                "format": form,
                "trial": trial.model_dump(mode="json"),
            },
        )
    end = "" if found.step == trial.train.num_steps else f" of {trial.train.num_steps}, the newest checkpoint"
    lacks = "" if "tokenizer.json" in files else f"; its tokenizer {', '.join(files)} is no tokenizer.json"
    return f"{to}: trial {trial_dir.name} at step {found.step}{end}, format {form}{lacks}"


def _tokenizer_files(data: DataConfig) -> dict[str, bytes]:
    """A tokenizer.json as it is, other files under their own names; Refused when it is not the trial's any more."""
    path = tokenizer_path(data.tokenizer)
    if path is None:
        return {"tokenizer.json": export.byte_tokenizer_json().encode()}
    if data.tokenizer_sha256 and (actual := tokenizer_sha256(str(path))) != data.tokenizer_sha256:
        raise export.Refused(
            f"{path} has changed since the trial: sha256 {actual[:16]}..., expected {data.tokenizer_sha256[:16]}..."
        )
    files = {"tokenizer.json" if path.suffix == ".json" else path.name: path.read_bytes()}
    pattern = path.with_name(path.name + ".json")
    if path.suffix == ".tiktoken" and pattern.exists():
        files[pattern.name] = pattern.read_bytes()
    return files
