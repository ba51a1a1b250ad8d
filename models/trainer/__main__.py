"""Run an attempt by hand: ``torchrun --nproc-per-node N -m models.trainer ATTEMPT_DIR`` (one rank: without torchrun).

ATTEMPT_DIR holds the ``attempt.json`` that the controller wrote; the run dir above it holds ``config.json``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from models.run_dir import metrics_path, read_attempt_spec
from models.trainer import World, train


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "attempt.json").exists():
        print("usage: python -m models.trainer ATTEMPT_DIR (a folder with attempt.json)", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = read_attempt_spec(Path(arguments[0]))
    if metrics_path(spec.attempt_dir).exists():
        print(f"{spec.attempt_dir} has run already: an attempt runs once", file=sys.stderr)
        return 2
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks != spec.layout.world_size:
        need = f"torchrun --nproc-per-node {spec.layout.world_size} -m models.trainer {arguments[0]}"
        print(f"the layout {spec.layout} has {spec.layout.world_size} ranks, got {num_ranks}: {need}", file=sys.stderr)
        return 2
    rank = int(os.environ.get("RANK", "0"))
    world = World.join(
        rank,
        spec.layout,
        spec.device,
        f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29511')}",
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        num_threads=spec.threads_per_rank,
    )
    summary = train(spec, world)
    world.leave()
    return 0 if summary.outcome == "complete" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
