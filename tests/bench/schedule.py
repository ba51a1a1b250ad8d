"""How well many trials keep a cluster busy: the real controller and store (SQLite) over simulated gangs.

``real``: one-second trials on 16 slots, in real time, over the ideal. ``virtual``: trials of about a minute on 1,000
nodes of 2 CPUs, in virtual time, of gangs of 1, 2, 4 and 8 ranks that take 5 s to start, against the offline list
schedule of the same trials, which knows every duration and starts gangs at no cost. CPU time is the whole process's,
the simulation included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_gangs import Bench, bench_in  # noqa: E402
from simulated_gangs import SimulatedCluster, VirtualClock, drawn, list_schedule, sweep_text  # noqa: E402
from sweep_runs import NoMirror, Watcher, plan_of  # noqa: E402

from orchestrator.controller import Controller  # noqa: E402
from orchestrator.controller.clock import Clock  # noqa: E402
from orchestrator.gang import GangShape  # noqa: E402
from orchestrator.plan import Plan  # noqa: E402

RAY_TUNE_OVER_IDEAL = 0.14
"""What its documentation gives for 10,000 one-second trials on 16 slots (https://docs.ray.io, tune scalability)."""
START_SECONDS = 5.0


def run(bench: Bench, plan: Plan, cluster: SimulatedCluster, clock: Clock) -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process."""
    sweep_id = bench.store.add(plan).sweep_id
    given = (plan.sweep, sweep_id, bench.store, cluster, NoMirror(), bench.home, Quiet(), (), clock)
    with Controller(*given) as controller:  # type: ignore[arg-type]
        begun, cpu = clock.monotonic(), time.process_time()
        controller.run()
        return clock.monotonic() - begun, time.process_time() - cpu


class Quiet(Watcher):
    def tick(self, snapshot: object) -> None:
        pass

    def tell(self, line: str) -> None:
        pass


def real(folder: Path, num_trials: int, num_slots: int = 16) -> None:
    plan = plan_of(folder, text=sweep_text(num_trials, {}))
    clock = Clock()
    cluster = SimulatedCluster(1, num_slots, lambda _: 1.0, clock)
    with bench_in(folder / "home") as bench:
        seconds, cpu = run(bench, plan, cluster, clock)
    ideal = num_trials / num_slots
    print(
        f"real time: {num_trials:,} one-second trials on {num_slots} slots: {seconds:.1f} s, ideal {ideal:g} s: "
        f"over by {seconds / ideal - 1:.1%} (Ray Tune publishes {RAY_TUNE_OVER_IDEAL:.0%}); from a trial's end to the "
        f"next one's launch {statistics.median(cluster.gaps) * 1000:.1f} ms (median); "
        f"{cpu / num_trials * 1000:.1f} ms of CPU a trial"
    )


def virtual(folder: Path, num_trials: int, num_nodes: int) -> None:
    plan = plan_of(folder, text=sweep_text(num_trials // 4))
    clock, seconds_of = VirtualClock(), drawn(60.0)
    cluster = SimulatedCluster(num_nodes, 2, seconds_of, clock, START_SECONDS)
    with bench_in(folder / "home") as bench:
        seconds, cpu = run(bench, plan, cluster, clock)
    listed = list_schedule(
        [(GangShape.of(trial.resources), seconds_of(trial.config)) for trial in plan.trials], cluster.sizes
    )
    print(
        f"virtual time: {len(plan.trials):,} trials of about 60 s, four shapes, {num_nodes:,} nodes: {seconds:.1f} s, "
        f"offline list schedule {listed:.1f} s: {listed / seconds:.1%} of it; "
        f"{cpu / len(plan.trials) * 1000:.1f} ms of CPU a trial"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", default=["real", "virtual"], help="real, virtual; default: both")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=1_000, help="of the virtual one")
    given = parser.parse_args()
    for which in given.which:
        with tempfile.TemporaryDirectory() as folder:
            real(Path(folder), given.trials) if which == "real" else virtual(Path(folder), given.trials, given.nodes)


if __name__ == "__main__":
    main()
