"""One sweep in MLflow: what the store has and MLflow has not is sent, a pass at a time.

Points come first, then tags and states, then artifacts. A pass may be killed anywhere and run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from models.redaction import redacted
from orchestrator.store import Store, StoreOutage
from orchestrator.tracking.artifacts import send_artifacts
from orchestrator.tracking.books import Books
from orchestrator.tracking.curves import CurvesPass, OutOfTime, Sent
from orchestrator.tracking.memory import Memory


class TrackingError(Exception):
    """MLflow did not take what it was sent. Nothing is lost: the next pass goes on from there."""


def mirror(
    store: Store,
    sweep_id: int,
    tracking_uri: str,
    artifact_location: str | None = None,
    *,
    memory: Memory | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    rebuild: bool = False,
) -> Sent:
    """Bring a sweep's runs up to what the store holds; raises only TrackingError, OutOfTime and StoreOutage.

    ``artifact_location`` is used when the experiment is first made; None leaves it to the tracking server.
    ``memory`` lasts over the passes of one process. ``rebuild`` forgets the runs and sends everything anew.
    With nothing to send MLflow is not even imported.
    """
    one = SweepMirror(store, sweep_id, tracking_uri, artifact_location, memory or Memory(), out_of_time)
    sent = one.send_curves(rebuild=rebuild)
    one.send_artifacts()
    return sent


class SweepMirror:
    """The same in two parts, each of which stops early when ``is_due``: the next points are, and they go first."""

    def __init__(
        self,
        store: Store,
        sweep_id: int,
        tracking_uri: str,
        artifact_location: str | None,
        memory: Memory,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._given = store, sweep_id, tracking_uri, artifact_location, memory
        self._memory, self._uri, self._out_of_time = memory, tracking_uri, out_of_time

    def send_curves(
        self, is_due: Callable[[], bool] = lambda: False, *, rest_seconds: float = 0.0, rebuild: bool = False
    ) -> Sent:
        with self._books() as books:
            if rebuild:
                books.forget()
            return CurvesPass(books, self._out_of_time).run(is_due, rest_seconds)

    def send_artifacts(self, is_due: Callable[[], bool] = lambda: False) -> None:
        with self._books() as books:
            send_artifacts(books, is_due, self._out_of_time)

    @contextmanager
    def _books(self) -> Iterator[Books]:
        books: Books | None = None
        try:
            books = Books(*self._given)
            yield books
        except (OutOfTime, StoreOutage):
            self._write(books)
            raise
        except Exception as error:
            self._write(books)
            self._memory.forget()
            cause = _root_cause(error)
            reason = redacted(f"{type(cause).__name__}: {cause}").partition("\n")[0]
            raise TrackingError(f"MLflow at {redacted(self._uri)} can't be written: {reason[:500]}") from error

    def _write(self, books: Books | None) -> None:
        """What MLflow took before the error; else it is sent again, which does no harm."""
        with suppress(Exception):
            if books is not None:
                books.write()


def _root_cause(error: BaseException) -> BaseException:
    """Below MLflow's and urllib3's wrappings: "Connection refused" says it best."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
