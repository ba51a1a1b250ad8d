"""The driver of a submitted sweep: ``python -m orchestrator.cli.submitted``, started by Ray Jobs on the head.

It is ``gatesweep run`` on the sweep that the parcel brought, with the packages that the parcel brought. Home, store
and tracking come from the cluster's own environment, or from what ``submit`` was told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

import orchestrator
from orchestrator.cli.home import Home
from orchestrator.cli.parcel import Parcel, unpack_sweep
from orchestrator.controller.provenance import PARCEL
from orchestrator.sweep import UserError

USER_ERROR_EXIT = 2
LOG_WIDTH = 120


def run_parcel(folder: Path, environment: Mapping[str, str], console: Console) -> int:
    """Check that what runs is what was sent in ``folder``, then run the sweep; the exit code."""
    from orchestrator.cli.run import run_sweep
    from orchestrator.gang import source_hash
    from orchestrator.plan import expand
    from orchestrator.sweep import load

    if not (folder / PARCEL).exists():
        raise UserError(f"package orchestrator was taken from {folder}, which is not what gatesweep submit sent")
    parcel = Parcel.model_validate_json((folder / PARCEL).read_text())
    own = source_hash()
    if own != parcel.source_hash:
        raise UserError(f"the packages here have the hash {own}, those sent {parcel.source_hash}: others came first")
    if not environment.get("GATESWEEP_HOME"):
        raise UserError(
            "GATESWEEP_HOME is not set on the cluster; allowed: set it where Ray is started, or submit with --home "
            "and a path that all nodes share"
        )
    home = Home.of(environment)
    try:
        sweep_file = unpack_sweep(folder, parcel, home.directory)
    except OSError as error:
        raise UserError(f"GATESWEEP_HOME {home.directory} can't be written on the head: {error}") from error
    plan = expand(load(sweep_file, parcel.overrides))
    address, metrics = environment.get("RAY_ADDRESS") or "auto", environment.get("GATESWEEP_METRICS")
    json_logs = environment.get("GATESWEEP_JSON_LOGS", "") not in ("", "0", "false")
    return run_sweep(plan, home, address, console, metrics=metrics or None, json_logs=json_logs)


def main() -> None:
    console = Console(width=LOG_WIDTH)
    try:
        sys.exit(run_parcel(Path(str(orchestrator.__file__)).parents[1], os.environ, console))
    except UserError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR_EXIT)


if __name__ == "__main__":
    main()
