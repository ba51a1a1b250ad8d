"""The micro-batch of every cell, and which cells do not fit into a rank's memory. Pure: by the model, not by trying.

A micro-batch belongs to the attempt. A dense model's numbers do not depend on it beyond rounding. Megatron's
load-balancing loss of experts does, for it weighs a micro-batch by the choices counted in the batch so far: cells with
experts that share a batch size (and ``layout.data``) therefore share a micro-batch, so that no arm differs by it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from pydantic.main import IncEx

from models.accounting import GIB, SPARE_FRACTION, RankMemory, fits, fullest_rank, largest_micro_batch, micro_batches
from models.config import Layout, TrainConfig, TrialConfig
from orchestrator.sweep import ResourcesConfig

NUM_MENDS = 3
"""How many layouts a refusal names that would do."""


def micro_batch_sizes(cells: Sequence[tuple[TrialConfig, ResourcesConfig]]) -> list[int]:
    """Sequences that a rank takes at once, for each config and its resources; where nothing fits, the least."""
    found: dict[str, int] = {}
    shared: dict[tuple[int, int], int] = {}
    keys = [size_key(config, resources) for config, resources in cells]
    for key, (config, resources) in zip(keys, cells, strict=True):
        if key not in found:
            found[key] = resources.micro_batch_sequences or _largest(config, resources)
        if config.model.moe is not None:
            batch = config.batch_sequences, resources.layout.data
            shared[batch] = min(found[key], shared.get(batch, found[key]))
    return [
        found[key] if config.model.moe is None else shared[config.batch_sequences, resources.layout.data]
        for key, (config, resources) in zip(keys, cells, strict=True)
    ]


def _largest(config: TrialConfig, resources: ResourcesConfig) -> int:
    largest = largest_micro_batch(config, resources.layout, resources.device, _limit(resources))
    return largest or micro_batches(config, resources.layout)[-1]


def size_key(config: TrialConfig, resources: ResourcesConfig) -> str:
    """What decides memory, parameters and FLOPs: cells that differ in their optimizer alone are reckoned once."""
    return config.model_dump_json(exclude=_NO_SIZE) + resources.model_dump_json()


_NO_SIZE: Mapping[str, IncEx | bool] = {
    "seed": True,
    "train": {name for name in TrainConfig.model_fields if "tokens" not in name},
}
"""Of how a config is trained only ``tokens`` and ``batch_tokens`` have a size."""


def memory_needed(config: TrialConfig, resources: ResourcesConfig, micro_batch: int) -> RankMemory:
    """Of the rank that needs most."""
    return fullest_rank(config, resources.layout, micro_batch, resources.device)


def memory_refusals(
    config: TrialConfig, resources: ResourcesConfig, refused: Callable[[TrialConfig, ResourcesConfig], Sequence[str]]
) -> list[str]:
    """Why the config does not fit, and which layouts would do; empty when it fits.

    ``refused`` gives the other reasons against a layout, so that none is named that could not run.
    """
    limit, given = _limit(resources), resources.micro_batch_sequences
    if limit is None:
        return []
    micro_batch = given or micro_batches(config, resources.layout)[-1]
    memory = memory_needed(config, resources, micro_batch)
    if fits(memory, limit):
        return []
    size = f"{micro_batch} sequence" + ("" if micro_batch == 1 else "s")
    said = f"does not fit: with micro-batches of {size} a rank needs {memory.total / GIB:,.1f} GiB, and has "
    said += f"{limit / GIB:,.1f}, of which {SPARE_FRACTION:.0%} stay free"
    if resources.memory_gib is None and resources.accelerator is None:
        said += " (an assumed size: set resources.accelerator or memory_gib)"
    would = list(itertools.islice(_mends(config, resources, refused), NUM_MENDS))
    return [f"{said}; what would fit: {', or '.join(would)}" if would else said]


def after_out_of_memory(config: TrialConfig, resources: ResourcesConfig, tried: int, error: str) -> str:
    """What to try where micro-batches of ``tried`` sequences took more memory than a rank had, as ``error`` tells.

    The model had thought that they fit. Whatever it left out is taken to be as large a share of a smaller one: that one
    must leave SPARE_FRACTION free beside what had seemed enough, and of the capacity, if the error names it.
    """
    otherwise = "resources.layout.recompute, or more ranks a model, need less memory"
    named = _CAPACITY.search(error)
    limit = float(named[1]) * GIB if named else _limit(resources)
    had = memory_needed(config, resources, tried).total
    seemed = had if limit is None else min(had, limit)
    for size in micro_batches(config, resources.layout):
        memory = memory_needed(config, resources, size)
        if size < tried and fits(memory, seemed):
            need = f"{memory.total / GIB:,.1f} GiB by the plan's model, where {tried} needed {had / GIB:,.1f}"
            return f"resources.micro_batch_sequences: {size} would fit ({need}); else {otherwise}"
    return f"no smaller micro-batch than {tried} would fit; {otherwise}"


_CAPACITY = re.compile(r"total capacity of ([0-9.]+) GiB")
"""As torch tells it of a card."""


def _mends(
    config: TrialConfig, resources: ResourcesConfig, refused: Callable[[TrialConfig, ResourcesConfig], Sequence[str]]
) -> Iterator[str]:
    """What fits, the cheapest first, in words: a smaller micro-batch, then of each kind of layout the first that does;
    with full recomputation on top only where nothing does without."""
    limit, layout = _limit(resources), resources.layout
    if resources.micro_batch_sequences is not None:
        largest = largest_micro_batch(config, layout, resources.device, limit)
        if largest is not None:
            yield f"micro_batch_sequences {largest}"
    alone = list(_changes(config, layout))
    kinds: set[tuple[str, ...]] = set()
    for changes in (*alone, *({**one, "recompute": "full"} for one in alone if "recompute" not in one)):
        changed = layout.model_copy(update=changes)
        kind = tuple(name for name in changes if name != "recompute") or ("recompute",)
        if kind in kinds or refused(config, _with(resources, changed)):
            continue
        if largest_micro_batch(config, changed, resources.device, limit) is not None:
            kinds.add(kind)
            yield " with ".join(f"layout.{name} {str(value).lower()}" for name, value in changes.items())


def _changes(config: TrialConfig, layout: Layout) -> Iterator[dict[str, object]]:
    """Recomputation costs a third more FLOPs; more ranks cost more hardware."""
    for recompute in ("selective", "full"):
        if layout.recompute == "none" or (layout.recompute, recompute) == ("selective", "full"):
            yield {"recompute": recompute}
    # Megatron trains experts over tensor ranks only with sequence parallelism.
    parallel: dict[str, object] = {"sequence_parallel": True} if config.model.moe is not None else {}
    for factor in (2, 4, 8, 16, 32):
        if config.model.moe is not None:
            ranks = layout.expert * factor
            if (layout.tensor * layout.context * layout.data) % ranks == 0:
                yield {"expert": ranks}
        yield {"tensor": layout.tensor * factor, **parallel}
        yield {"pipeline": layout.pipeline * factor}
        if config.model.moe is not None:
            yield {"data": layout.data * factor, "expert": layout.expert * factor}
        else:
            yield {"data": layout.data * factor}


def _with(resources: ResourcesConfig, layout: Layout) -> ResourcesConfig:
    return resources.model_copy(update={"layout": layout, "micro_batch_sequences": None})


def _limit(resources: ResourcesConfig) -> float | None:
    gib = resources.rank_memory_gib
    return None if gib is None else gib * GIB
