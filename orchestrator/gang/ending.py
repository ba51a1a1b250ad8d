"""What the errors of a gang mean: whose fault, and in words."""

from __future__ import annotations

import re

import ray

from models.redaction import redacted


class RankError(Exception):
    """What a rank raised, as text: the driver would load torch to unpickle an error of Megatron's or the trainer's."""


def words(error: BaseException) -> str:
    """Class and message of the original error, without Ray's frames around it."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RankError):
        return str(cause)
    text = str(cause).strip() or type(cause).__name__
    return redacted(f"{type(cause).__name__}: {text}")[:4000]


DEATH, RAISED, BROKEN = range(3)
_BROKEN_COLLECTIVE = re.compile(r"gloo/transport/|Gloo connectFullMesh|NCCL error|DistBackendError|DistNetworkError")


def blame(error: Exception) -> int:
    """How much an error tells about why a gang failed, the least telling last."""
    if isinstance(error, ray.exceptions.RayActorError):
        return DEATH
    return BROKEN if is_broken_collective(words(error)) else RAISED


def is_broken_collective(said: str) -> bool:
    """Whether an error, in words, is a survivor's: another rank of its gang is gone."""
    return _BROKEN_COLLECTIVE.search(said) is not None


def death(error: BaseException) -> str:
    """One line of Ray's long message about a dead actor: which process, where, and what the system saw."""
    text = str(error)
    pid, address = re.search(r"pid: (\d+)", text), re.search(r"ip: (\S+)", text)
    detail = re.search(r"(?:Worker exit detail|The actor is dead because): (.+?)(?: Some common causes|$)", text, re.M)
    process = f"process {pid[1]} of a rank" if pid else "a rank's process"
    return redacted(f"{process}{f' at {address[1]}' if address else ''} died: {detail[1] if detail else text[:300]}")


def exit_code(said: str) -> int | None:
    """The exit code with which a rank ended its process, where the words tell one."""
    found = re.match(r"SystemExit: (\d+)$", said) or re.search(r"exit code:? (\d+)", said)
    return int(found[1]) if found else None
