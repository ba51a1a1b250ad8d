"""No credential reaches a log, the store, MLflow or a message, whichever way a connection fails."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from small_trials import corpus_trial, new_attempt, write_corpus
from store_backends import postgres_server, store_url  # noqa: F401
from store_runs import Run, run, store  # noqa: F401

from models import redaction, trust
from models.redaction import redacted, redacted_content
from orchestrator.gang.ending import words
from orchestrator.store import Store
from orchestrator.sweep import UserError
from orchestrator.tracking import Mirror, TrackingError, mirror

PASSWORD = "hunter2%2Fx"
"""As it stands in a URL; ``hunter2/x`` when decoded."""
TOKEN = "ghp_" + "a1B2" * 9

CREDENTIALS = {
    "postgresql+psycopg://me:hunter2@host/db": "postgresql+psycopg://me:***@host/db",
    "can't reach http://:hunter2@host:5000/x, nor http://b:hunter3@c": "can't reach http://:***@host:5000/x, nor http://b:***@c",
    "conninfo host=db password=hunter2 user=me": "conninfo host=db password=*** user=me",
    '{"Password": "hunter2", "user": "me"}': '{"Password": "***", "user": "me"}',
    "PGPASSWORD='hunter2' psql": "PGPASSWORD='***' psql",
    "GET /x?token=hunter2&page=2": "GET /x?token=***&page=2",
    "Authorization: Bearer hunter2": "Authorization: Bearer ***",
    "-H 'authorization: Basic aHVudGVyMg=='": "-H 'authorization: Basic ***'",
    "client_secret: hunter2": "client_secret: ***",
    f"git clone https://{TOKEN}@github.com/x": "git clone https://***@github.com/x",
    "key AKIAABCDEFGHIJKLMNOP in use": "key *** in use",
    "POST https://hooks.slack.com/services/T0/B0/abc": "POST https://hooks.slack.com/services/***",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghij ": "*** ",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----\nend": "***\nend",
}  # fmt: skip


@pytest.mark.parametrize("text", CREDENTIALS)
def test_a_credential_is_known_by_its_place_or_shape(text):
    assert redacted(text) == CREDENTIALS[text]


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b",
        "train.tokens=5e6, 12 tokens=3, token 4",
        "attempt 001-1f2e3d4c of 21cbca08c0528082",
        "the lease on sweep 3 with token 4 was lost: the token is now 5",
        "corpus s3://bucket/part.jsonl: sha256 0123456789abcdef..., expected fedcba9876543210...",
        "resources.layout: {tensor: 2, data: 1}; basic configuration",
    ],
    ids=len,  # pytest puts a test's name into the environment, whose URLs hold passwords
)
def test_other_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_a_credential_is_known_by_its_value(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("SOME_URL", "mysql://me:s3cr%2Ft@host/db")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsely")
    monkeypatch.setenv("TRAINING_PASS", "123456")
    text = "0123456789abcdef0123456789abcdef01234567, s3cr%2Ft and s3cr/t, falsely 123456"
    assert redacted(text) == "***, *** and ***, falsely 123456"


def test_the_signing_key_is_hidden():
    key = trust.read_key()
    assert redacted(f"the key is {key}") == "the key is ***"


def test_nested_content_keeps_its_form():
    content = {"a": [1, None, "x://u:p@h"], "b": {"c": True, "d": 2.5}}
    assert redacted_content(content) == {"a": [1, None, "x://u:***@h"], "b": {"c": True, "d": 2.5}}


# -- at rest ------------------------------------------------------------------------------------------------------


def test_the_store_holds_no_credential_whoever_writes(run: Run, store: Store):  # noqa: F811
    leak = f"failed at mysql://me:hunter2@host with {TOKEN}"
    attempt = store.start_attempt(
        run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={"diff": [leak], "env": {"URL": leak}}
    )
    store.end_attempt(run.lease, attempt, state="FAILED", cause="error", reason=leak, log_tail=f"line\n{leak}\n")
    store.add_event(run.sweep_id, "gang_lost", leak)
    text = f"name: quick\n# {leak}\n"
    store.add(
        run.plan.__class__(run.plan.sweep.model_copy(update={"text": text, "question": leak}), run.plan.trials, ())
    )
    (row,) = store.attempts(run.fingerprint)
    sweep = store.sweep("quick")
    stored = [row.reason, row.log_tail, json.dumps(row.provenance), run.trial().reason, sweep.text, sweep.question]
    stored += [event.message for event in store.events(run.sweep_id)]
    assert sum("mysql://me:***@host with ***" in (one or "") for one in stored) >= 7
    for one in stored:
        assert "hunter2" not in (one or "")
        assert TOKEN not in (one or "")


def test_a_ranks_log_and_summary_hold_no_credential(world, tmp_path, monkeypatch):
    from models import corpus
    from models.trainer import train

    def fails(*_):
        raise RuntimeError("no corpus at s3://me:hunter2@host/x")

    monkeypatch.setattr(corpus, "gather", fails)
    spec = new_attempt(tmp_path, corpus_trial(write_corpus(tmp_path / "corpus.jsonl")))
    with pytest.raises(RuntimeError, match="no corpus") as error:
        train(spec, world)
    written = {path.name: path.read_text() for path in spec.attempt_dir.iterdir() if path.is_file()}
    assert "s3://me:***@host/x" in written["log-rank0.txt"]
    assert "s3://me:***@host/x" in written["summary.json"]
    assert not any("hunter2" in text for text in written.values())
    assert words(error.value) == "RuntimeError: no corpus at s3://me:***@host/x"


# -- a store or a tracking server with a password, failing in every way ---------------------------------------------


def told_by(url):
    """What opening a store says, with everything that is chained to it."""
    with pytest.raises(UserError, match="store") as error:
        Store(url)
    seen, said = error.value, []
    while seen is not None:
        said.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    return said[0], said


BAD_STORES = {
    "host down": f"postgresql://me:{PASSWORD}@127.0.0.1:1/db",
    "no such host": f"postgresql://me:{PASSWORD}@nowhere.invalid/db",
    "a bad option": f"postgresql://me:{PASSWORD}@127.0.0.1:1/db?sslmode=perhaps",
    "an unknown option": f"postgresql://me:{PASSWORD}@127.0.0.1:1/db?hunter=1",
    "a bad port": f"postgresql://me:{PASSWORD}@127.0.0.1:port/db",
    "another back end": f"mysql://me:{PASSWORD}@host/db",
    "an unknown driver": f"nosuch+driver://me:{PASSWORD}@host/db",
    "sqlite with a password": f"sqlite://me:{PASSWORD}@host/db?x=1",
}


@pytest.mark.parametrize("how", BAD_STORES)
def test_a_stores_password_is_in_no_error(how, monkeypatch):
    monkeypatch.setenv("GATESWEEP_STORE", BAD_STORES[how])
    message, chained = told_by(BAD_STORES[how])
    for text in (message, *map(redacted, chained)):
        assert "hunter2" not in text


def test_a_refused_password_and_a_missing_database_are_told_without_it(postgres_server):  # noqa: F811
    folder = postgres_server.new_schema().partition("?host=")[2].partition("&")[0]
    message, _ = told_by(f"postgresql://gatesweep:{PASSWORD}@/nosuch?host={folder}")
    assert 'database "nosuch" does not exist' in message
    assert "hunter2" not in message
    message, _ = told_by(f"postgresql://nobody:{PASSWORD}@/postgres?host={folder}")
    assert "hunter2" not in message


@pytest.mark.parametrize("uri", ["http://me:{}@127.0.0.1:1", "postgresql://me:{}@127.0.0.1:1/db", "mysql://me:{}@h/x"])
def test_a_tracking_servers_password_is_in_no_error_log_or_event(
    run: Run,  # noqa: F811
    store: Store,  # noqa: F811
    uri,
    caplog,
    monkeypatch,
):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # else it tries for minutes
    if store.url.startswith("postgresql"):
        pytest.skip("once is enough: MLflow's side is what fails")
    run.complete(run.fingerprint, 3.0)
    uri = uri.format(PASSWORD)
    with pytest.raises(TrackingError, match=r"MLflow at .* can't be written") as error:
        mirror(store, run.sweep_id, uri)
    assert "me:***@" in str(error.value)
    caplog.set_level(logging.INFO)
    background = Mirror(store, run.sweep_id, uri)
    background.step()
    said = [str(error.value), *(event.message for event in store.events(run.sweep_id)), caplog.text]
    assert any("MLflow is not reached" in one for one in said)
    assert not any("hunter2" in one for one in said)


def test_a_defects_traceback_shows_no_credential(tmp_path):
    """The command line's last resort, in a process of its own."""
    code = (
        "import sys; from orchestrator.cli import app\n"
        "def broken(): raise RuntimeError('lost postgresql://me:hunter2@host/db')\n"
        "app.app = broken; app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert "RuntimeError: lost postgresql://me:***@host/db" in done.stderr
    assert "Traceback" in done.stderr
    assert "hunter2" not in done.stderr


def test_what_hide_was_told_is_cut_out(monkeypatch):
    monkeypatch.setattr(redaction, "_hidden", set())
    redaction.hide("from-a-file")
    redaction.hide("short")
    redaction.hide(None)
    assert redacted("a from-a-file b, short") == "a *** b, short"


def test_no_column_with_free_text_is_left_out():
    """A new one has to say what it is: text from anywhere, or one of these."""
    from sqlalchemy import Text

    from orchestrator.store import schema

    plain = [
        f"{table.name}.{column.name}"
        for table in schema.metadata.tables.values()
        for column in table.columns
        if type(column.type) is Text
    ]
    assert plain == []
