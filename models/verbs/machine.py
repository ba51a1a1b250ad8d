"""``python -m models.verbs.machine``: what ``gatesweep doctor`` asks of a process that loads torch. Prints JSON.

``describe``: torch, Megatron, GPUs, Transformer Engine, each by itself, so that a broken one does not hide the others.
``allreduce``: one rank of a measurement; every rank of it is a process like this.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from typing import Any

MEGABYTES = 16
REPEATS = 7
WARM_UP = 2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.verbs.machine")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("describe")
    measured = verbs.add_parser("allreduce")
    measured.add_argument("--rank", type=int, required=True)
    measured.add_argument("--ranks", type=int, required=True)
    measured.add_argument("--meet", required=True, help="torch's rendezvous URL")
    measured.add_argument("--device", choices=("cpu", "cuda"), required=True)
    asked = parser.parse_args(arguments)
    if asked.verb == "describe":
        said = describe()
    else:
        said = {"gigabytes_per_second": allreduce(asked.rank, asked.ranks, asked.meet, asked.device)}
    print(json.dumps(said))
    return 0


def describe() -> dict[str, Any]:
    """``{name: {"version": ..., "error": ...}}`` of torch, megatron.core and transformer_engine, and the GPUs that
    torch can use."""
    said: dict[str, Any] = {name: _loaded(name) for name in ("torch", "megatron.core")}
    said["gpus"] = []
    if said["torch"]["error"] is None:
        import torch

        said["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            said["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
    said["transformer_engine"] = _loaded("transformer_engine.pytorch") if said["gpus"] else None
    return said


def _loaded(name: str) -> dict[str, str | None]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a compiled library that does not fit raises anything
        return {"version": None, "error": f"{type(error).__name__}: {error}"[:500]}
    owner = importlib.import_module(name.partition(".")[0])
    version = getattr(module, "__version__", None) or getattr(owner, "__version__", None)
    return {"version": None if version is None else str(version), "error": None}


def _gpu(index: int) -> dict[str, Any]:
    """A product on the GPU, and whether it is right: a device may be listed and still not work."""
    import torch

    facts: dict[str, Any] = {"name": torch.cuda.get_device_name(index)}
    try:
        facts["free_bytes"], facts["total_bytes"] = torch.cuda.mem_get_info(index)
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        facts["error"] = None if bool((ones @ ones == 256).all()) else "a product of ones came out wrong"
    except RuntimeError as error:
        facts["error"] = str(error)[:500]
    return facts


def allreduce(rank: int, ranks: int, meet: str, device: str) -> float:
    """Gigabytes (10^9) a second of a rank's 16 MB, median of 7: 2 (n - 1) / n times the bytes over the time, as NCCL's
    tests count it."""
    import torch
    from torch import distributed

    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=meet, rank=rank, world_size=ranks
    )
    values = torch.ones(MEGABYTES * 1_000_000 // 4, device=device)
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        distributed.barrier()
        before = time.perf_counter()
        distributed.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    distributed.destroy_process_group()
    return 2 * (ranks - 1) / ranks * MEGABYTES / 1000 / statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
