"""``gatesweep run``: a sweep in the foreground, from its plan to its table."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console

from orchestrator import report
from orchestrator.cli.copies import copies_place, finish_copies, open_copier
from orchestrator.cli.fresh import refuse_other_looks, refuse_reuse, refuse_stale
from orchestrator.cli.home import Home
from orchestrator.cli.json_log import JsonLogged
from orchestrator.cli.live import PlainView, view_for
from orchestrator.cli.signing import check_key
from orchestrator.controller import (
    BudgetUsedUp,
    ClusterLost,
    Controller,
    SweepStopped,
    View,
    bring_up_to_date,
    is_dead,
)
from orchestrator.copies import Copier
from orchestrator.gang import Cluster
from orchestrator.notices import open_webhook
from orchestrator.plan import Plan
from orchestrator.search import StudyMirror
from orchestrator.store import BUDGET_EXTENDED, FINISHED, LeaseLost, Store
from orchestrator.sweep import UserError, refuse_extensions
from orchestrator.tracking import Mirror, TrackingError, mirror

INTERRUPTED_EXIT, FAILED_EXIT, BUDGET_EXIT = 130, 1, 3
MIRROR_CATCH_UP_SECONDS = 60.0
NOTICES_SECONDS = 15.0
WAIT_SECONDS = 2.0
"""Between two looks at the lease of another run."""
_EXTEND = "--extend gpu_hours=+HOURS, or cpu_hours, or wall_hours"
CELLS_NAMED = 4
"""Cells listed under a reason that refuses them; gatesweep plan lists all."""


def refuse(plan: Plan) -> None:
    """UserError when a cell cannot run: nothing of the sweep is started then."""
    if plan.refusals:
        lines = [f"{plan.sweep.path}: {len(plan.refusals)} cell(s) are refused, nothing was started:"]
        for reason in dict.fromkeys(one.reason for one in plan.refusals):
            same = [one for one in plan.refusals if one.reason == reason]
            cells = [", ".join([one.arm, *(f"{name}={value}" for name, value in one.axes.items())]) for one in same]
            more = [f"and {len(cells) - CELLS_NAMED} more"] if len(cells) > CELLS_NAMED else []
            lines += [f"  {reason}", f"    {'; '.join([*cells[:CELLS_NAMED], *more])}"]
        raise UserError("\n".join(lines))


def run_sweep(
    plan: Plan,
    home: Home,
    address: str | None,
    console: Console,
    extensions: Sequence[str] = (),
    metrics: str | None = None,
    reuse: bool = True,
    json_logs: bool = False,
    waits: bool = False,
) -> int:
    """Store the plan, run what is missing, print the table; the exit code. ``extensions``: to budgets, first.
    ``metrics``: where Prometheus may ask, as ``[HOST:]PORT``. ``reuse``: other sweeps' trials may serve this one.
    ``json_logs``: controller and ranks also write JSON lines. ``waits``: for another run of the sweep to end."""
    refuse(plan)
    refuse_extensions(plan.sweep.name, plan.sweep.budget.model_dump(), extensions)
    try:
        home.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"GATESWEEP_HOME {home.directory} can't be made: {error.strerror}") from error
    check_key(home.directory)
    place = copies_place(home)
    sweep = plan.sweep
    with Store(home.store_url) as store:
        if waits:
            _wait_for_turn(store, sweep.name, console)
        _refuse_second(store, sweep.name)
        refuse_other_looks(plan, store)
        refuse_stale(plan, store)
        if not reuse:
            refuse_reuse(plan, store)
        before = _planned(store, sweep.name)
        added = store.add(plan)
        for extension in extensions:
            store.add_event(added.sweep_id, BUDGET_EXTENDED, extension)
        plan = bring_up_to_date(store, plan, lambda line: console.print(line, highlight=False))
        current = store.trials(added.sweep_id)
        states = [trial.state for trial in current]
        missing = sum(state in ("WAITING", "RUNNING") for state in states)
        copier = None if place is None else open_copier(place, home, store, added.sweep_id, current)
        console.print(
            f"{sweep.name}: {len(states)} trials, {added.num_new} new, "
            f"{sum(state in FINISHED for state in states)} finished, {missing} to run",
            highlight=False,
        )
        forgotten = len(before - {trial.fingerprint for trial in current})
        if forgotten:
            console.print(f"{forgotten} trial(s) of the last submission are not planned any more", highlight=False)
        used_up = [line for line in store.budget(added.sweep_id) if line.is_used_up]
        if missing and used_up:
            exit_code = BUDGET_EXIT
            for line in report.budget_lines(used_up, sweep.name):
                console.print(line, style="bold red", highlight=False, soft_wrap=True)
        elif missing:
            exit_code = _run_missing(plan, added.sweep_id, store, home, address, console, metrics, json_logs, copier)
        else:
            exit_code = 0
            catch_up(store, home, console)
        console.print(report.ResultsView(report.results(store, sweep.name)))
        if copier is not None:
            finish_copies(copier, console, is_done=not exit_code)
        failed = sum(trial.state == "FAILED" for trial in store.trials(added.sweep_id))
    if failed:
        console.print(
            f"{failed} trial(s) FAILED; gatesweep status says why, gatesweep rerun {sweep.name} --failed", markup=False
        )
    return exit_code or (FAILED_EXIT if failed else 0)


def _planned(store: Store, name: str) -> set[str]:
    """Fingerprints of the sweep's last submission."""
    known = [sweep.id for sweep in store.sweeps() if sweep.name == name]
    return {trial.fingerprint for trial in store.trials(known[0])} if known else set()


def _refuse_second(store: Store, name: str) -> None:
    """UserError while another controller runs the sweep: adding the plan would change it under that one's feet."""
    holder = _other_controller(store, name)
    if holder is not None:
        raise UserError(
            f"sweep {name} is run by {holder} now; nothing was changed. gatesweep status shows it; run --wait waits"
        )


def _wait_for_turn(store: Store, name: str, console: Console) -> None:
    """Until no other controller has the sweep: it has ended, or its lease has run out because it is dead."""
    told = None
    while (holder := _other_controller(store, name)) is not None:
        if holder != told:
            console.print(f"sweep {name} is run by {holder} now: waiting until it ends, or its lease", highlight=False)
            told = holder
        time.sleep(WAIT_SECONDS)


def _other_controller(store: Store, name: str) -> str | None:
    """Who runs the sweep now. A dead process of this host runs nothing, and its lease is waited for later."""
    known = [sweep.id for sweep in store.sweeps() if sweep.name == name]
    held = store.lease_holder(known[0]) if known else None
    return None if held is None or is_dead(held[0]) else held[0]


def _run_missing(
    plan: Plan,
    sweep_id: int,
    store: Store,
    home: Home,
    address: str | None,
    console: Console,
    metrics: str | None,
    json_logs: bool,
    copier: Copier | None,
) -> int:
    sweep = plan.sweep
    background = _mirror(store, sweep_id, sweep.name, home)
    webhook = open_webhook(sweep.notices, lambda kind, message: store.add_event(sweep_id, kind, message))
    console.print(f"connecting to Ray at {address}" if address else "starting a local Ray", highlight=False)
    with (
        view_for(console) as shown,
        _metered(shown, plan, sweep_id, store, background, metrics) as metered,
        JsonLogged(metered, home.directory, sweep.name) if json_logs else nullcontext(metered) as view,
        Cluster(address) as cluster,
    ):
        background.start()
        if webhook is not None:
            webhook.start()
        try:
            given = (sweep, sweep_id, store, cluster, background, home.directory, view, plan.confirmations)
            controller = Controller(*given, webhook=webhook, plan=plan, json_logs=json_logs, copier=copier)
            with controller, _clean_stop(controller):
                controller.run()
        except BudgetUsedUp as stopped:
            view.tell(f"stopped: {stopped}; with --extend the same command goes on from here: {_EXTEND}")
            return BUDGET_EXIT
        except SweepStopped as stopped:
            view.tell(f"stopped: {stopped}; the same command goes on from here")
            return INTERRUPTED_EXIT
        except ClusterLost as lost:
            raise UserError(
                f"sweep {sweep.name}: {lost}. Once there is a cluster again, the same command goes on from here"
            ) from lost
        except LeaseLost as lost:
            raise UserError(
                f"sweep {sweep.name} was taken over by another run, and this one has ended: {lost}"
            ) from lost
        finally:
            if webhook is not None and not webhook.close(NOTICES_SECONDS):
                console.print("notices.webhook did not take every notice; gatesweep status says why")
            if not background.close(MIRROR_CATCH_UP_SECONDS):
                console.print(f"MLflow lacks part of {sweep.name}; the next run, or gatesweep ui, catches up")
    return 0


def catch_up(store: Store, home: Home, console: Console) -> None:
    """Mirror what an outage or a kill kept from MLflow, for every sweep. Nothing is imported when nothing is behind."""
    for sweep in store.sweeps():
        try:
            sent = mirror(store, sweep.id, home.tracking_uri, home.artifact_location)
        except TrackingError as error:
            console.print(f"{sweep.name}: MLflow is behind and not reached: {error}", markup=False, highlight=False)
        else:
            if sent.num_trials:
                console.print(f"{sweep.name}: MLflow caught up with {sent.num_trials} trial(s)", highlight=False)


def _mirror(store: Store, sweep_id: int, name: str, home: Home) -> Mirror:
    study = StudyMirror(store, sweep_id, name, home.optuna_url)
    return Mirror(store, sweep_id, home.tracking_uri, home.artifact_location, also={"Optuna's copy": study.update})


def _metered(
    view: PlainView, plan: Plan, sweep_id: int, store: Store, background: Mirror, metrics: str | None
) -> AbstractContextManager[View]:
    """The view, and figures for Prometheus where they are asked for."""
    if metrics is None:
        return nullcontext(view)
    from orchestrator.cli.metrics import Metered

    return Metered(view, store, sweep_id, plan.sweep.name, background.lags, metrics)


@contextmanager
def _clean_stop(controller: Controller) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the controller to stop; a second one stops waiting for checkpoints."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda got, _: controller.request_stop(signal.Signals(got).name)) for number in signals
    ]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
