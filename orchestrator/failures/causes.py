"""Why attempts end, who is to blame, and how a cause is told from what was seen. The table that the product stands on.

A rule looks at one kind of evidence: the error that a rank raised or that Ray told of it, the exit code of its process,
or the bounded tail of its log. The first rule that matches names the cause; a sweep's own rules come before these.
Patterns are RE2's: matching takes linear time, whatever a log holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.sweep import CountsAs, FailureRule, compile_pattern

RANK_DIED = "rank_died"
ERROR = "error"
NONFINITE = "nonfinite"
PREEMPTED = "preempted"
HANG = "hang"
DISK_FULL = "disk_full"
DISK_READ_ONLY = "disk_read_only"
CORRUPT_CHECKPOINT = "corrupt_checkpoint"
UNTRUSTED_FILES = "untrusted_files"
GPU_OUT_OF_MEMORY = "gpu_out_of_memory"


@dataclass(frozen=True)
class Cause:
    """A kind of end. ``host_faults``: how much it weighs against the host of the rank that failed."""

    name: str
    counts_as: CountsAs
    host_faults: int = 0


EXCLUDED_AT = 2
"""Faults after which a host gets no more gangs of the sweep."""

CAUSES = {
    cause.name: cause
    for cause in (
        Cause(PREEMPTED, "nothing"),
        Cause(DISK_FULL, "nothing"),
        Cause(DISK_READ_ONLY, "nothing"),
        Cause("node_lost", "infrastructure", host_faults=1),
        Cause("hardware", "infrastructure", host_faults=EXCLUDED_AT),
        Cause("megatron_restart", "infrastructure", host_faults=1),
        Cause("megatron_exclude", "infrastructure", host_faults=EXCLUDED_AT),
        Cause("host_out_of_memory", "infrastructure"),
        Cause("collective_timeout", "infrastructure"),
        Cause(HANG, "infrastructure"),
        Cause(CORRUPT_CHECKPOINT, "infrastructure"),
        Cause(RANK_DIED, "infrastructure", host_faults=1),
        Cause(GPU_OUT_OF_MEMORY, "never_again"),
        Cause("bad_config", "never_again"),
        Cause(UNTRUSTED_FILES, "never_again"),
        Cause(ERROR, "error"),
    )
}

_BUILT_IN = tuple(
    FailureRule(cause=cause, counts_as=CAUSES[cause].counts_as, host_faults=CAUSES[cause].host_faults, **evidence)
    for cause, evidence in (
        # Megatron's re-run state machine: 16 asks for another try elsewhere, 17 says that the node computes wrongly.
        ("megatron_restart", {"exit_code": 16}),
        ("megatron_exclude", {"exit_code": 17}),
        ("hardware", {"log": r"NVRM: Xid|uncorrectable ECC|(?i:ecc error)|CUDA error: (uncorrectable|hardware)"}),
        ("hardware", {"error": r"uncorrectable ECC|(?i:ecc error)|CUDA error: (uncorrectable|hardware|unknown error)"}),
        (DISK_FULL, {"error": r"No space left on device|Disk quota exceeded|database or disk is full"}),
        (DISK_READ_ONLY, {"error": r"Read-only file system"}),
        (GPU_OUT_OF_MEMORY, {"error": r"CUDA out of memory|OutOfMemoryError: CUDA|CUDA error: out of memory"}),
        ("host_out_of_memory", {"error": r"running low on memory|OutOfMemoryError: Task was killed|OOM"}),
        (CORRUPT_CHECKPOINT, {"error": r"^CheckpointError"}),
        (UNTRUSTED_FILES, {"error": r"^Untrusted"}),
        ("node_lost", {"error": r"node (it was running on )?(is |has been |was )?(dead|died|terminated|lost|removed)"}),
        ("collective_timeout", {"error": r"Watchdog caught collective|[Tt]imed? ?out (after )?waiting.*(gloo|NCCL)"}),
        ("collective_timeout", {"error": r"(gloo|NCCL|DistBackendError).*([Tt]imeout|[Tt]imed out)"}),
        ("bad_config", {"error": r"^(ConfigError|ValidationError)"}),
    )
)


@dataclass(frozen=True)
class Evidence:
    """What was seen of an attempt that did not end by itself."""

    error: str
    log: str
    exit_code: int | None
    rank_died: bool


def diagnose(evidence: Evidence, rules: Iterable[FailureRule] = ()) -> Cause:
    """The cause by the first rule that matches: the sweep's ``rules``, then the built-in ones."""
    for rule in (*rules, *_BUILT_IN):
        if _matches(rule, evidence):
            return Cause(rule.cause, rule.counts_as, rule.host_faults)
    return CAUSES[RANK_DIED if evidence.rank_died else ERROR]


def counted_as(cause: str | None, rules: Iterable[FailureRule] = ()) -> CountsAs:
    """The budget that an earlier attempt's cause was charged to."""
    own: Iterator[CountsAs] = (rule.counts_as for rule in rules if rule.cause == cause)
    known = CAUSES.get(cause or "")
    return next(own, known.counts_as if known else "nothing")


def _matches(rule: FailureRule, evidence: Evidence) -> bool:
    """All that the rule names must hold."""
    return (
        (rule.exit_code is None or rule.exit_code == evidence.exit_code)
        and (rule.error is None or _pattern(rule.error).search(evidence.error) is not None)
        and (rule.log is None or _pattern(rule.log).search(evidence.log) is not None)
    )


@lru_cache(maxsize=256)
def _pattern(text: str) -> Any:
    return compile_pattern(text)
