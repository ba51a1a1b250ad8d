"""Keep a finished grid's curves as one small file, which ``prune.py`` replays.

    python tests/bench/record_grid.py sqlite:///runs/gatesweep.db ablation tests/bench/data/ablation.json.gz

Only the trials that choose learning rates are kept: a grid of arms x rates x seeds, whole, every trial at its end.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from orchestrator.store import Store
from orchestrator.sweep import UserError


def record(store: Store, name: str) -> dict[str, object]:
    sweep = store.sweep(name)
    seeds = sweep.settings["seeds"]
    trials = [trial for trial in store.trials(sweep.id) if trial.seed in seeds]
    if left := [trial.fingerprint for trial in trials if trial.state not in ("COMPLETE", "DIVERGED")]:
        raise UserError(f"{name}: {len(left)} trials of the grid have not ended; a replay needs whole curves")
    attempts = {trial.fingerprint: store.attempts(trial.fingerprint) for trial in trials}
    curves = []
    for trial in sorted(trials, key=lambda one: (sweep.arms.index(one.arm), one.config.train.lr, one.seed)):
        curve = store.curve(trial.fingerprint)
        on_slice = [row for row in curve.validations if row.split == "slice"]
        curves.append(
            {
                "arm": trial.arm,
                "lr": trial.config.train.lr,
                "seed": trial.seed,
                "state": trial.state,
                "validation_steps": [row.step for row in on_slice],
                "validation_nats": [row.loss_nats for row in on_slice],
                "training_nats": [None if row.loss_nats is None else round(row.loss_nats, 4) for row in curve.steps],
            }
        )
    last = [made[-1] for made in attempts.values()]
    return {
        "sweep": name,
        "text": sweep.text,
        "baseline": sweep.baseline,
        "margin_nats": sweep.verdict.get("margin"),
        "num_steps": trials[0].config.train.num_steps,
        "num_parameters": sorted({trial.num_parameters for trial in trials}),
        "commit": sorted({str(one.provenance.get("commit")) for one in last}),
        "packages": last[0].provenance["packages"],
        "trial_hours": round(sum(one.seconds or 0.0 for made in attempts.values() for one in made) / 3600, 2),
        "trials": curves,
    }


def main() -> None:
    url, name, out = sys.argv[1:]
    with Store(url) as store:
        content = record(store, name)
    with gzip.GzipFile(out, "wb", mtime=0) as stream:
        stream.write(json.dumps(content).encode())
    print(f"{out}: {len(content['trials'])} trials, {Path(out).stat().st_size:,} bytes")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
