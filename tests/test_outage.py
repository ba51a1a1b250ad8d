"""The store goes away in the middle of a sweep and comes back: the same results, and status says what happened."""

# ruff: noqa: F811 (fixtures are imported by name)

import contextlib
import io
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from fake_gangs import Bench, FakeCluster, bench, plan, undisturbed  # noqa: F401
from store_backends import PostgresServer, postgres_server  # noqa: F401
from store_runs import Run, run, steps, store, store_url  # noqa: F401
from sweep_runs import Watcher

from orchestrator.controller.clock import Clock
from orchestrator.controller.outage import OutageWatch
from orchestrator.plan import Plan
from orchestrator.report import status_table
from orchestrator.store import LeaseLost, Store, StoreOutage


class Cut:
    """What a test does to the store, and takes back while the controller waits for it."""

    def __init__(self, begin, end, after_tries=3):
        self.begin, self.end, self.left = begin, end, after_tries
        self.num_sleeps = 0

    def clock(self):
        cut = self

        class Counting(Clock):
            """Sleeps nothing; the outage is over after so many tries."""

            def sleep(self, seconds):
                if cut.left is not None and cut.begun:
                    cut.left -= 1
                    if cut.left == 0:
                        cut.left = None
                        cut.end()

        return Counting()

    begun = False

    def at(self, line):
        """As a watcher's ``on_line``: the outage begins when the first trial has started."""

        def heard(said):
            if said.startswith(line) and not self.begun:
                self.begun = True
                self.begin()

        return heard


def swept_through(bench: Bench, plan: Plan, store: Store, cut: Cut, capacity: int = 2) -> Watcher:
    watcher = Watcher()
    watcher.on_line = cut.at("started")
    bench.store = store
    sweep_id = store.add(plan).sweep_id
    with bench.controller(plan, FakeCluster(capacity), watcher, clock=cut.clock()) as controller:
        controller.run()
    assert cut.left is None, "the outage was never met"
    assert store.lease_holder(sweep_id) is None
    return watcher


def told(store: Store, sweep_id: int) -> list[str]:
    return [event.kind for event in store.events(sweep_id)]


# -- SQLite -------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """A writer gives up at once instead of after a minute."""
    monkeypatch.setattr("orchestrator.store.engine.BUSY_SECONDS", 0)


def locking(path: Path) -> Cut:
    """Another program holds the database's write lock, as a backup does."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def end():
        other.execute("ROLLBACK")
        other.close()

    return Cut(lambda: other.execute("BEGIN IMMEDIATE"), end)


def test_a_locked_store_is_waited_for(bench: Bench, plan: Plan, undisturbed, impatient, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'locked.db'}") as store:
        watcher = swept_through(bench, plan, store, locking(tmp_path / "locked.db"))
        assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}
        assert bench.curves(plan) == undisturbed
        assert all(row.num_attempts == 1 for row in bench.trials(plan).values())
        events = [event for event in store.events() if event.kind.startswith("store_")]
        assert [event.kind for event in events] == ["store_down", "store_back"]
        assert "database is locked; training went on" in events[0].message
        assert events[0].at <= events[1].at
        assert [line.split()[0] for line in watcher.lines if line.startswith(("PAUSED", "goes on"))] == [
            "PAUSED",
            "goes",
        ]


def test_a_lease_that_was_taken_during_an_outage_is_lost(bench: Bench, plan: Plan, impatient, tmp_path):
    path = tmp_path / "locked.db"
    with Store(f"sqlite:///{path}") as store:
        cut = locking(path)
        unlock = cut.end

        def taken():
            unlock()
            with contextlib.closing(sqlite3.connect(path)) as other, other:
                other.execute("UPDATE lease SET token = token + 1, holder = 'other:1'")

        cut.end = taken
        with pytest.raises(LeaseLost, match="was lost"):
            swept_through(bench, plan, store, cut)
        assert not [event for event in store.events() if event.kind.startswith("store_")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 4 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def filled(place: Path) -> Cut:
    def begin():
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as stream:
            while True:
                stream.write(b"\0" * 4096)

    return Cut(begin, (place / "filler").unlink)


def read_only(place: Path) -> Cut:
    def remount(how):
        return lambda: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)

    return Cut(remount("ro"), remount("rw"))


@pytest.mark.parametrize("how", [filled, read_only])
def test_a_store_on_a_full_or_read_only_disk_is_waited_for(bench: Bench, plan: Plan, undisturbed, small_disk, how):
    cut = how(small_disk)
    if how is read_only:  # files open for writing forbid it: the store's connections are closed first
        remount = cut.begin
        cut.begin = lambda: (bench.store.close(), remount())
    with Store(f"sqlite:///{small_disk / 'gatesweep.db'}") as store:
        swept_through(bench, plan, store, cut)
        assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}
        assert bench.curves(plan) == undisturbed
        assert [event.kind for event in store.events() if event.kind.startswith("store_")] == [
            "store_down",
            "store_back",
        ]


# -- Postgres -----------------------------------------------------------------------------------------------------


def test_postgres_is_stopped_and_started_in_the_middle_of_a_sweep(
    bench: Bench, plan: Plan, undisturbed, postgres_server: PostgresServer
):
    with Store(postgres_server.new_schema()) as store:
        swept_through(bench, plan, store, Cut(postgres_server.pause, postgres_server.resume))
        assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}
        assert bench.curves(plan) == undisturbed
        assert all(row.num_attempts == 1 for row in bench.trials(plan).values())
        shown = as_text(status_table(store))
        assert "store_down: the store postgresql" in shown
        assert "store_back: the store is back after" in shown


def as_text(table) -> str:
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


# -- calls that are made again --------------------------------------------------------------------------------------


class Counted:
    """Patience that only counts."""

    def __init__(self):
        self.waits, self.overs = [], 0

    def wait(self, outage):
        self.waits.append(outage)

    def over(self):
        self.overs += 1


@pytest.fixture
def lost_commit(monkeypatch):
    """The next transaction is committed, and the connection is lost before the store hears of it."""
    from sqlalchemy.exc import OperationalError

    from orchestrator.store import face

    begin, left = face.writing, [1]

    @contextlib.contextmanager
    def losing(engine):
        with begin(engine) as connection:
            yield connection
        if left:
            left.pop()
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"), connection_invalidated=True)

    return lambda: monkeypatch.setattr(face, "writing", losing)


def test_a_start_whose_commit_was_not_heard_of_is_found_again(run: Run, store: Store, lost_commit):
    patience = Counted()
    lost_commit()
    attempt = store.patient(patience).start_attempt(
        run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={}
    )
    assert (len(patience.waits), patience.overs) == (1, 1)
    assert [one.id for one in store.attempts(run.fingerprint)] == [attempt.id]
    assert run.trial().state == "RUNNING"


def test_an_end_whose_commit_was_not_heard_of_is_not_ended_again(run: Run, store: Store, lost_commit):
    attempt = run.start()
    lost_commit()
    patience = Counted()
    store.patient(patience).end_attempt(run.lease, attempt, state="WAITING", cause="hang", reason="hung")
    assert len(patience.waits) == 1
    (row,) = store.attempts(run.fingerprint)
    assert (row.cause, run.trial().state) == ("hang", "WAITING")


def test_records_whose_commit_was_not_heard_of_are_kept_once(run: Run, store: Store, lost_commit):
    attempt = run.start()
    lost_commit()
    store.patient(Counted()).record(run.lease, attempt, steps(1, 5))
    assert [row.step for row in store.curve(run.fingerprint).steps] == [1, 2, 3, 4, 5]


def test_without_patience_an_outage_is_an_error_of_the_stores(run: Run, store: Store, lost_commit):
    lost_commit()
    with pytest.raises(StoreOutage, match=r"the store .* can't be used: server closed the connection"):
        run.start()


def test_a_defect_is_no_outage(store: Store):
    """It would be wrong for ever."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    patience = Counted()
    with pytest.raises(DBAPIError, match="nothing"):
        store.patient(patience)._read(lambda connection: connection.execute(text("SELECT 1 FROM nothing")))
    assert not patience.waits


def test_who_asks_twice_to_stop_does_not_wait_for_the_store(store: Store):
    watcher = Watcher()
    watch = OutageWatch(store, 1, Clock(), watcher)
    watch.is_hurried = lambda: True
    with pytest.raises(StoreOutage, match="gone"):
        watch.wait(StoreOutage("gone"))
    assert watcher.lines == ["PAUSED    gone; training goes on, nothing is started until it is back"]


def test_the_mirror_does_not_blame_mlflow_for_the_store(run: Run, store: Store, monkeypatch):
    from orchestrator.tracking import Mirror, mirror

    def away():
        raise StoreOutage("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "sweeps", away)
        with pytest.raises(StoreOutage, match="away"):
            mirror(store, run.sweep_id, "sqlite:///nowhere.db")
        Mirror(store, run.sweep_id, "sqlite:///nowhere.db").step()
    assert store.events(run.sweep_id) == []
