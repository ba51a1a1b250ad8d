"""Notices: what is signed and sent, to whom never, and that a receiver that fails hurts nobody. A real https server."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_gangs import Bench, FakeClock, FakeCluster, bench, plan  # noqa: F401
from sweep_runs import Watcher, plan_of, wait_for

from orchestrator.controller.wave import WaveWatch
from orchestrator.notices import Webhook, networks_of, notice_body, open_webhook, read_reference
from orchestrator.notices.addresses import why_refused
from orchestrator.notices.signing import key_of
from orchestrator.notices.webhook import LONGEST_QUEUE
from orchestrator.sweep import NOTICE_KINDS, NoticesConfig, UserError, WaveConfig

KEY = b"a key of thirty-two bytes, or so"
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
PATH = "/services/T0/B0/the-secret-part"


class Receiver:
    """An https server on loopback, what it got, and what it is to answer."""

    def __init__(self, folder: Path) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.paths: list[str] = []
        self.answers: list[int] = []
        """Next ones first; then 204."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.paths.append(self.path)
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status = receiver.answers.pop(0) if receiver.answers else 204
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"https://localhost:{receiver.port}/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        certificate = self_signed(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.trust = ssl.create_default_context(cafile=str(certificate))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def webhook(self, told: list[tuple[str, str]] | None = None, host: str = "localhost", **changes: Any) -> Webhook:
        def tell(kind: str, message: str) -> None:
            if told is not None:
                told.append((kind, message))

        given = {"networks": LOOPBACK, "context": self.trust, "first_pause_seconds": 0.001, **changes}
        return Webhook(f"https://{host}:{self.port}{PATH}", KEY, tell, **given)


def self_signed(folder: Path) -> Path:
    """A certificate for localhost with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    path = folder / "localhost.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("tls"))
    yield receiver
    receiver.close()


@pytest.fixture
def receiver(server: Receiver) -> Receiver:
    server.got.clear()
    server.paths.clear()
    server.answers.clear()
    return server


# -- delivery -------------------------------------------------------------------------------------------------


def test_a_notice_arrives_signed_over_id_time_and_body(receiver: Receiver):
    hook = receiver.webhook()
    hook.start()
    hook.send(notice_body("budget", "x", "80% is used", {"limit_hours": 5.0}))
    assert hook.close(60)
    ((headers, body),) = receiver.got
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == f"localhost:{receiver.port}"
    told = json.loads(body)
    assert told["type"] == "gatesweep.budget"
    assert told["data"] == {"sweep": "x", "message": "80% is used", "limit_hours": 5.0}
    assert receiver.paths == [PATH]


def test_a_receiver_that_is_down_is_tried_again_with_one_id_and_told_once(receiver: Receiver):
    told: list[tuple[str, str]] = []
    receiver.answers += [503, 500, 429]
    hook = receiver.webhook(told)
    hook.start()
    hook.send(b"{}")
    wait_for(lambda: len(receiver.got) == 4, "the fourth try")
    assert hook.close(60)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert [kind for kind, _ in told] == ["webhook_down", "webhook_back"]
    assert "it answered 503" in told[0][1]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_not_tried_again(receiver: Receiver, status: int):
    told: list[tuple[str, str]] = []
    receiver.answers += [status]
    hook = receiver.webhook(told)
    hook.start()
    hook.send(b"{}")
    assert not hook.close(60)
    assert receiver.paths == [PATH]
    assert f"it answered {status}: redirects are not followed" in told[0][1]


def test_what_the_receiver_refuses_is_given_up_and_the_next_notice_goes_on(receiver: Receiver):
    told: list[tuple[str, str]] = []
    receiver.answers += [403, 410]
    hook = receiver.webhook(told)
    hook.start()
    for number in range(3):
        hook.send(str(number).encode())
    hook.close(60)
    assert [body for _, body in receiver.got] == [b"0", b"1", b"2"]
    assert [kind for kind, _ in told] == ["webhook_down", "webhook_back"]
    assert hook.num_lost == 2


def test_a_certificate_that_is_not_trusted_or_not_for_the_host_is_refused(receiver: Receiver):
    for changes in ({"context": ssl.create_default_context()}, {"host": "127.0.0.1"}):
        told: list[tuple[str, str]] = []
        hook = receiver.webhook(told, **changes)
        hook.start()
        hook.send(b"{}")
        assert not hook.close(60)
        assert "its certificate is not valid" in told[0][1]
    assert receiver.got == []


def test_loopback_is_refused_unless_the_constructor_allows_it(receiver: Receiver):
    told: list[tuple[str, str]] = []
    hook = receiver.webhook(told, networks=())
    hook.start()
    hook.send(b"{}")
    assert not hook.close(60)
    assert "it is at a loopback address, where no notice goes" in told[0][1]
    assert receiver.got == []


def test_the_connection_goes_to_the_address_that_was_judged(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    """DNS rebinding: a name that is at another address at the second look."""
    looks: list[str] = []

    def rebinding(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        looks.append(host)
        numeric = host if host[0].isdigit() else ("127.0.0.1" if len(looks) == 1 else "169.254.169.254")
        return [(2, 1, 6, "", (numeric, port))]

    monkeypatch.setattr("socket.getaddrinfo", rebinding)
    hook = receiver.webhook()
    hook.start()
    hook.send(b"{}")
    assert hook.close(60)
    assert len(receiver.got) == 1
    assert looks.count("localhost") == 1


def test_one_bad_address_behind_a_name_is_enough(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    both = [(2, 1, 6, "", ("127.0.0.1", 1)), (2, 1, 6, "", ("169.254.169.254", 1))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: both)
    told: list[tuple[str, str]] = []
    hook = receiver.webhook(told)
    hook.start()
    hook.send(b"{}")
    assert not hook.close(60)
    assert "a metadata service's address" in told[0][1]
    assert receiver.got == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.53", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("2002:7f00:1::", "loopback"),
        ("0.0.0.0", "reserved"),
        ("::", "reserved"),
        ("224.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("10.1.2.3", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("fd12::1", "private"),
    ],
)
def test_addresses_that_no_notice_goes_to(address: str, reason: str):
    assert reason in (why_refused(ipaddress.ip_address(address), ()) or "")


def test_the_internet_and_named_private_networks_are_allowed_but_no_metadata_in_them():
    assert why_refused(ipaddress.ip_address("1.1.1.1"), ()) is None
    assert why_refused(ipaddress.ip_address("2606:4700::1111"), ()) is None
    named = networks_of("10.0.0.0/8, 100.64.0.0/10")
    assert why_refused(ipaddress.ip_address("10.1.2.3"), named) is None
    assert why_refused(ipaddress.ip_address("100.100.100.200"), named) is not None
    for text in ("127.0.0.0/8", "169.254.169.254", "0.0.0.0/0", "::/0", "fe80::/64"):
        with pytest.raises(UserError, match="holds loopback or link-local"):
            networks_of(text)
    with pytest.raises(UserError, match=r"allowed: such as 10\.0\.0\.0/8"):
        networks_of("10.0.0.1/8")


def test_a_full_queue_drops_the_oldest_and_sending_never_waits(receiver: Receiver):
    hook = receiver.webhook()
    for number in range(LONGEST_QUEUE + 2):
        hook.send(str(number).encode())
    hook._queue = type(hook._queue)(list(hook._queue)[:1])
    hook.start()
    assert not hook.close(60), "two were lost"
    assert [body for _, body in receiver.got] == [b"2"]


def test_a_host_that_answers_nothing_ends_with_the_sweep(receiver: Receiver):
    import socket

    told: list[tuple[str, str]] = []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    hook = Webhook(f"https://localhost:{port}/", KEY, lambda *event: told.append(event), networks=LOOPBACK)
    hook.start()
    hook.send(b"{}")
    wait_for(lambda: told, "the outage to be told")
    assert not hook.close(60)
    assert "ConnectionRefusedError" in told[0][1]


def test_words_about_failures_hold_neither_url_nor_key(receiver: Receiver):
    told: list[tuple[str, str]] = []
    for answers, changes in (([503, 404], {}), ([], {"networks": ()}), ([302], {}), ([], {"host": "127.0.0.1"})):
        receiver.answers[:] = answers
        hook = receiver.webhook(told, **changes)
        hook.start()
        hook.send(b"{}")
        hook.close(60)
        assert "secret-part" not in repr(hook)
    assert len(told) >= 4
    words = " ".join(message for _, message in told)
    assert not any(part in words for part in ("secret-part", "localhost", "127.0.0.1", KEY.decode()))


def test_a_teller_that_fails_stops_nothing(receiver: Receiver):
    def broken(*_: Any) -> None:
        raise OSError("the store is down")

    receiver.answers += [500]
    hook = Webhook(
        f"https://localhost:{receiver.port}/", KEY, broken, networks=LOOPBACK, context=receiver.trust,
        first_pause_seconds=0.001,
    )  # fmt: skip
    hook.start()
    hook.send(b"{}")
    wait_for(lambda: len(receiver.got) == 2, "the second try")
    assert hook.close(60)


# -- what a file may say ----------------------------------------------------------------------------------------


def test_secrets_come_by_reference_and_are_refused_when_they_are_not_there(tmp_path: Path):
    (tmp_path / "key").write_text("  from a file, long enough\n")
    assert read_reference(f"file:{tmp_path / 'key'}", "notices.secret") == "from a file, long enough"
    assert read_reference("env:HOOK", "notices.secret", {"HOOK": "x"}) == "x"
    with pytest.raises(UserError, match=r"notices\.secret \(env:HOOK\): the environment variable is not set"):
        read_reference("env:HOOK", "notices.secret", {})
    with pytest.raises(UserError, match=r"notices\.webhook \(file:/nowhere\): the file can't be read: No such file"):
        read_reference("file:/nowhere", "notices.webhook")


def test_keys_are_text_or_base64_and_never_short():
    assert key_of("whsec_" + base64.b64encode(KEY).decode()) == KEY
    assert key_of(KEY.decode()) == KEY
    with pytest.raises(UserError, match="has 5 bytes; allowed: at least 16"):
        key_of("short")
    with pytest.raises(UserError, match="comes base64, and this is none"):
        key_of("whsec_???")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("notices={webhook: 'http://x.org/a', secret: 'env:S'}", "allowed: https://HOST/PATH, env:NAME or file:/PATH"),
        ("notices={webhook: 'https://u:pw@x.org/a', secret: 'env:S'}", "a URL with a user or a password"),
        ("notices={webhook: 'https://x.org/a', secret: 'hunter2hunter2hunter2'}", "a secret is not written here"),
        ("notices={webhook: 'https://x.org/a'}", "webhook and secret go together"),
        ("notices={on: [everything]}", "trial_failed"),
        ("notices={wave: {share: 1.5}}", "share"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, override: str, said: str):
    with pytest.raises(UserError) as refused:
        plan_of(tmp_path, [override])
    words = str(refused.value).rpartition("}: notices")[2]  # behind the override itself, as far as it is shown
    assert said in words
    assert not any(part in words for part in ("hunter2", "x.org", "pw"))


def test_a_webhook_is_opened_from_references_and_one_without_is_none(monkeypatch: pytest.MonkeyPatch):
    config = NoticesConfig(webhook="env:HOOK_URL", secret="env:HOOK_KEY")
    monkeypatch.setenv("HOOK_KEY", KEY.decode())
    with pytest.raises(UserError, match=r"notices\.webhook \(env:HOOK_URL\): the environment variable is not set"):
        open_webhook(config, lambda *_: None)
    monkeypatch.setenv("HOOK_URL", "http://plain.example.org/")
    with pytest.raises(UserError, match=r"notices\.webhook: allowed: https") as refused:
        open_webhook(config, lambda *_: None)
    assert "plain" not in str(refused.value)
    monkeypatch.setenv("HOOK_URL", "https://hooks.example.org/a?b=c")
    hook = open_webhook(config, lambda *_: None)
    assert hook is not None
    assert (hook._target.host, hook._target.port, hook._target.path) == ("hooks.example.org", 443, "/a?b=c")
    assert open_webhook(NoticesConfig(), lambda *_: None) is None


# -- what a sweep tells -----------------------------------------------------------------------------------------


class Heard:
    """In the place of a webhook."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def send(self, body: bytes) -> None:
        self.bodies.append(json.loads(body))

    @property
    def kinds(self) -> list[str]:
        return [body["type"].removeprefix("gatesweep.") for body in self.bodies]


def test_a_sweep_tells_failures_budgets_and_its_end(bench: Bench, tmp_path: Path):
    """An hour a look, a budget that is nearly used up at the end."""
    plan = plan_of(tmp_path, ["budget.wall_hours=8.5"])
    heard, watcher, clock = Heard(), Watcher(), FakeClock()
    watcher.on_tick = lambda _: setattr(clock, "now", clock.now + 3600)
    fate = lambda _spec, config, step: "raise" if config.gate is not None and step == 3 else None  # noqa: E731
    with bench.controller(plan, FakeCluster(2, fate), watcher, clock, heard) as controller:
        controller.run()
    assert heard.kinds == ["trial_failed", "budget", "sweep_done"]
    failed, budget, done = (body["data"] for body in heard.bodies)
    assert (failed["arm"], failed["cause"], failed["attempt"]) == ("g1", "error", 1)
    assert budget["message"] == "80% of budget.wall_hours 8.5 is used"
    assert (budget["budget"], budget["limit_hours"]) == ("wall_hours", 8.5)
    assert 6.8 <= budget["spent_hours"] < 8.5
    assert done["states"] == {"COMPLETE": 1, "FAILED": 1}
    sweep_id = bench.store.sweep("tiny").id
    assert [event.kind for event in bench.store.events(sweep_id) if event.kind in NOTICE_KINDS] == heard.kinds


def test_only_what_is_asked_for_goes_to_the_webhook_and_all_of_it_to_the_store(bench: Bench, tmp_path: Path):
    plan = plan_of(tmp_path, ["notices={on: [trial_failed]}"])
    heard = Heard()
    with bench.controller(plan, FakeCluster(2), webhook=heard) as controller:
        controller.run()
    assert heard.kinds == []
    assert len(bench.store.events(bench.store.sweep("tiny").id, kind="sweep_done")) == 1


# -- waves of divergence ----------------------------------------------------------------------------------------


@pytest.fixture
def rows(bench: Bench, tmp_path: Path) -> dict[tuple[str, float, int], Any]:
    """Three arms, three rates, two seeds; by arm, rate and seed."""
    text = "arms={baseline: {}, g1: {gate: {position: sdpa}}, g2: {gate: {position: value}}}"
    plan = plan_of(tmp_path, [text, "axes={train.lr: [1e-3, 2e-3, 1.0]}", "seeds=[1,2]"])
    trials = bench.store.trials(bench.store.add(plan).sweep_id)
    return {(trial.arm, trial.config.train.lr, trial.seed): trial for trial in trials}


def waves(rows: dict[Any, Any], ends: list[tuple[Any, str]], config: WaveConfig | None = None) -> list[bool]:
    """Whether each end, a minute after the one before, made a wave."""
    watch = WaveWatch(config or WaveConfig(), "baseline")
    trials = list(rows.values())
    return [
        watch.ended(rows[key], state, trials, 60.0 * minute) is not None for minute, (key, state) in enumerate(ends)
    ]


def test_the_third_unexpected_divergence_among_few_ends_is_a_wave(rows: dict[Any, Any]):
    ends = [(("g1", 1e-3, 1), "DIVERGED"), (("g1", 2e-3, 1), "DIVERGED"), (("g2", 2e-3, 1), "DIVERGED")]
    assert waves(rows, ends) == [False, False, True]
    watch = WaveWatch(WaveConfig(), "baseline")
    wave = [watch.ended(rows[key], state, list(rows.values()), 0.0) for key, state in ends][-1]
    assert wave is not None
    assert wave.facts == {"diverged": 3, "ended": 3, "minutes": 60.0, "arms": ["g1", "g2"]}


def test_the_highest_rate_and_rates_at_which_the_baseline_diverged_are_expected_to(rows: dict[Any, Any]):
    highest = [((arm, 1.0, seed), "DIVERGED") for seed in (1, 2) for arm in ("g1", "g2", "baseline")]
    assert not any(waves(rows, highest))
    above_the_baseline = [((arm, 2e-3, seed), "DIVERGED") for arm in ("baseline", "g1", "g2") for seed in (1, 2)]
    assert not any(waves(rows, above_the_baseline))


def test_three_among_many_good_ends_are_no_wave_and_old_ones_are_forgotten(rows: dict[Any, Any]):
    good = [((arm, 1e-3, seed), "COMPLETE") for arm in ("baseline", "g1", "g2") for seed in (1, 2)]
    bad = [(("g1", 2e-3, 1), "DIVERGED"), (("g1", 2e-3, 2), "DIVERGED"), (("g2", 2e-3, 1), "DIVERGED")]
    assert not any(waves(rows, [*good, *bad]))
    assert any(waves(rows, [*good, *bad], WaveConfig(share=0.3)))
    assert any(waves(rows, [*good, *bad], WaveConfig(minutes=3)))
    assert not any(waves(rows, bad, WaveConfig(minutes=1)))


def test_a_wave_is_told_once_a_window(rows: dict[Any, Any]):
    ends = [((arm, lr, seed), "DIVERGED") for arm in ("g1", "g2") for lr in (1e-3, 2e-3) for seed in (1, 2)]
    assert waves(rows, ends) == [False, False, True, False, False, False, False, False]
