"""What a sweep talks to: the store, MLflow, and the ports of this host that should not be open to others."""

from __future__ import annotations

import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from orchestrator.copies import CopyError, Place
from orchestrator.doctor.finding import Finding, Level
from orchestrator.store import Store
from orchestrator.sweep import UserError
from orchestrator.tracking import is_server

ASKED = 5
REQUEST_SECONDS = 10.0
SLOW_STORE_SECONDS = 0.1
SKEW_SECONDS = 1.0
_GUARDED = {8265: "Ray's dashboard and Jobs", 10001: "Ray's Client", 6379: "Ray's control store", 5000: "MLflow"}
_RUNS_CODE = (8265, 10001, 6379)
JOBS_PORT = 8265


def check_store(url: str) -> Iterator[Finding]:
    """Reached, of this schema, how fast, and whether its clock is ours: leases go by the database's."""
    path = Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
    if path is not None and not path.exists():
        yield Finding("store", Level.OK, f"{path} is not there yet; the first run makes it")
        return
    try:
        with Store(url) as store:
            seconds = []
            for _ in range(ASKED):
                before = time.perf_counter()
                store.query("SELECT 1")
                seconds.append(time.perf_counter() - before)
            skew = None if path is not None else _skew(store)
            shown = store.url
    except UserError as error:
        mend = "GATESWEEP_STORE or GATESWEEP_STORE_FILE, and gatesweep of one version wherever it is used"
        yield Finding("store", Level.PROBLEM, str(error), mend)
        return
    median = statistics.median(seconds)
    level = Level.WARNING if median > SLOW_STORE_SECONDS else Level.OK
    mend = "" if level is Level.OK else "a store nearer to the controller: it is asked several times a second"
    yield Finding("store", level, f"{shown} answers in {1000 * median:.0f} ms", mend)
    if skew is not None:
        yield skew_finding("the store's", skew)


def _skew(store: Store) -> float:
    before = time.time()
    theirs = float(store.query("SELECT extract(epoch from clock_timestamp())::float8 AS now")["now"].iloc[0])
    return theirs - (before + time.time()) / 2


def skew_finding(whose: str, seconds: float, host: str = "") -> Finding:
    level = Level.WARNING if abs(seconds) > SKEW_SECONDS else Level.OK
    mend = "" if level is Level.OK else "chrony or ntpd on every host: logs and curves are put in order by time"
    return Finding("clock", level, f"{whose} is {seconds:+.2f} s from ours", mend, host)


def check_tracking(uri: str) -> Iterator[Finding]:
    """An MLflow server answers; a database of one's own needs nothing."""
    if not is_server(uri):
        yield Finding("tracking", Level.OK, "a local database; no server is needed")
        return
    address = uri.rstrip("/") + "/health"
    shown = address.rpartition("@")[2] if "@" in address else address
    before = time.perf_counter()
    try:
        urllib.request.urlopen(address, timeout=REQUEST_SECONDS).close()
    except (OSError, ValueError) as error:
        mend = "GATESWEEP_MLFLOW; a sweep runs on without it, and catches up"
        yield Finding("tracking", Level.WARNING, f"{shown}: {error}", mend)
    else:
        yield Finding("tracking", Level.OK, f"{shown} answers in {1000 * (time.perf_counter() - before):.0f} ms")


def check_copies(url: str | None) -> Iterator[Finding]:
    """A small file is written there, read and removed; nothing is said where no copies are asked for."""
    if url is None:
        return
    name, content = f".doctor-{uuid4().hex}", b"gatesweep doctor"
    before = time.perf_counter()
    try:
        place = Place(url, "GATESWEEP_COPIES").open()
        place.write(name, content)
        found = place.read(name)
        place.remove(name)
    except (CopyError, UserError) as error:
        mend = "GATESWEEP_COPIES and its credentials; a sweep runs on without copies, and the next run makes them"
        yield Finding("copies", Level.WARNING, str(error), mend)
        return
    if found != content:
        yield Finding("copies", Level.PROBLEM, f"{place}: what is written is not what is read", "another place")
        return
    yield Finding(
        "copies", Level.OK, f"{place} takes and gives a file in {1000 * (time.perf_counter() - before):.0f} ms"
    )


def check_ports(
    listening: Iterable[tuple[str, int]] | None = None, asks: Callable[[int], bool] | None = None
) -> Iterator[Finding]:
    """Ports that other hosts reach and that let in whoever comes. ``listening``: (address, port); None: this host's.
    ``asks``: whether the Ray of this host wants a token, told by its dashboard's port."""
    sockets = _listening() if listening is None else listening
    ours = [(address.removeprefix("::ffff:"), port) for address, port in sockets if port in _GUARDED]
    exposed = sorted({port for address, port in ours if not address.startswith("127.") and address != "::1"})
    is_guarded = any(port == JOBS_PORT for _, port in ours) and (asks or _asks_for_a_token)(JOBS_PORT)
    for port in exposed:
        name, said = f"port {port}", f"{_GUARDED[port]}: open to other hosts"
        if port not in _RUNS_CODE:
            mend = "--host 127.0.0.1 and an SSH tunnel, or authentication in front of it"
            yield Finding(name, Level.WARNING, said, mend)
        elif is_guarded:
            yield Finding(name, Level.OK, f"{said}, and asks for a token")
        else:
            mend = "RAY_AUTH_MODE=token on every node; or 127.0.0.1 and an SSH tunnel"
            yield Finding(name, Level.PROBLEM, f"{said}, without a token: who gets in runs code here", mend)
    if not exposed:
        yield Finding("ports", Level.OK, "Ray's and MLflow's usual ports are not open to other hosts")


def _listening() -> list[tuple[str, int]]:
    import psutil

    connections = psutil.net_connections("tcp")
    return [(one.laddr.ip, one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN]


def _asks_for_a_token(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=REQUEST_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    return False
