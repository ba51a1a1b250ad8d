"""What Prometheus reads of a controller, by HTTP, and the dashboard that shows it."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest
from fake_gangs import Bench, FakeCluster, bench, plan  # noqa: F401
from sweep_runs import PATIENCE_SECONDS, Watcher

from orchestrator.cli.metrics import Metered, host_and_port
from orchestrator.plan import Plan
from orchestrator.sweep import UserError

DASHBOARD = Path(__file__).parents[1] / "infra" / "grafana" / "gatesweep.json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> dict[str, float]:
    """By metric and labels, without the sweep's."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS).read().decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {re.sub(r',?sweep="tiny"', "", name).replace("{}", ""): float(value) for name, _, value in lines}


@pytest.fixture
def figures(bench: Bench, plan: Plan):
    """Of a sweep that ended, one of whose attempts died."""

    def dies_once(spec, _config, step):
        return "die" if spec.number == 1 and step == 7 and spec.fingerprint == plan.trials[0].fingerprint else None

    port, watcher = free_port(), Watcher()
    sweep_id = bench.store.add(plan).sweep_id
    with Metered(watcher, bench.store, sweep_id, "tiny", lambda: {"MLflow": 3.5}, str(port)) as view:
        with bench.controller(plan, FakeCluster(2, dies_once), view) as controller:
            controller.run()
        yield view, port


def test_states_attempts_hours_and_lags_are_told(figures, bench: Bench):
    view, port = figures
    listening = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
    said = scraped(port)
    assert said['gatesweep_trials{state="COMPLETE"}'] == 2
    assert said['gatesweep_trials{state="WAITING"}'] == 0
    assert said['gatesweep_attempts_ended{cause="complete"}'] == 2
    assert sum(value for name, value in said.items() if name.startswith("gatesweep_attempts_ended")) == 3
    assert said['gatesweep_tracking_lag_seconds{mirror="MLflow"}'] == 3.5
    assert said["gatesweep_store_up"] == 1
    assert said['gatesweep_hours{kind="gpu"}'] == 0
    assert any(line.startswith("complete") for line in view._view.lines)


def test_an_outage_of_the_store_leaves_the_rest(figures, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def down(_sweep_id: int) -> None:
        raise ConnectionError("the database is gone")

    monkeypatch.setattr(bench.store, "spent", down)
    said = scraped(figures[1])
    assert said["gatesweep_store_up"] == 0
    assert said['gatesweep_trials{state="COMPLETE"}'] == 2
    assert 'gatesweep_hours{kind="gpu"}' not in said


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it(figures):
    _, port = figures
    shown = set(re.findall(r"gatesweep_\w+", DASHBOARD.read_text()))
    told = {re.split(r"\W", name)[0] for name in scraped(port)} | {"gatesweep_eta_seconds"}  # of a running one
    assert shown == told
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_port_that_is_taken_is_a_message(bench: Bench, plan: Plan):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = str(taken.getsockname()[1])
        with (
            pytest.raises(UserError, match=rf"--metrics: 127.0.0.1:{where} can't be listened on"),
            Metered(Watcher(), bench.store, 1, "tiny", dict, where),
        ):
            pass


def test_only_a_host_given_opens_it_to_others():
    assert host_and_port("9464") == ("127.0.0.1", 9464)
    assert host_and_port("0.0.0.0:9464") == ("0.0.0.0", 9464)
    for wrong in ("", "host", "host:", "0", "70000", "-1"):
        with pytest.raises(UserError, match="allowed: a port, or HOST:PORT"):
            host_and_port(wrong)
