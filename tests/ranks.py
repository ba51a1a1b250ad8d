"""Run a function on N fresh processes, one a rank: ``run(function, num_ranks, *arguments)``.

Fresh, since a process that was a rank of one world brings its thread pools along, and since a killed rank must not
take the tests with it. The function must be importable by name; it is called with (rank, folder, *arguments), where
``folder`` is shared by the ranks and new for every run: a place for torch's file rendezvous.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300.0


def run(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """What each rank returned. Raises AssertionError with a rank's last lines when one fails or is killed."""
    results, exit_codes, logs = outcomes(function, num_ranks, *arguments)
    for rank, code in enumerate(exit_codes):
        assert code == 0, f"rank {rank} of {num_ranks} ended with {code}:\n{logs[rank][-4000:]}"
    return results


def outcomes(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> tuple[list[Any], list[int], list[str]]:
    """Results (None where a rank gave none), exit codes (negative: the signal), and what each rank printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((function.__module__, function.__qualname__, sys.path, arguments)))
        processes = []
        for rank in range(num_ranks):
            with (folder / f"log{rank}").open("wb") as log:
                command = [sys.executable, "-W", "ignore", __file__, name, str(rank)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        try:
            codes = [process.wait(TIMEOUT_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = [
            pickle.loads(path.read_bytes()) if (path := folder / f"result{rank}").exists() else None
            for rank in range(num_ranks)
        ]
        return results, codes, [(folder / f"log{rank}").read_text(errors="replace") for rank in range(num_ranks)]


def _main(folder: Path, rank: int) -> None:
    module, name, path, arguments = pickle.loads((folder / "job").read_bytes())
    sys.path[:] = path
    result = getattr(importlib.import_module(module), name)(rank, folder, *arguments)
    aside = folder / f"aside{rank}"
    aside.write_bytes(pickle.dumps(result))
    aside.replace(folder / f"result{rank}")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
