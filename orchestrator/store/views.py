"""The documented views, in the SQL that SQLite and Postgres share. README.md beside this file explains each column.

The reader's rule: a row (attempt a, step s) counts iff no later attempt of the trial resumed before s. As that is
``s <= min(resume_step of later attempts)``, it is decided once an attempt (``attempt_span``) and not once a row; a
trial that was stopped (PRUNED, DIVERGED) also ends at its ``end_step``.

Views are made anew after every migration. A changed view therefore needs a revision, if an empty one, which
``VIEWS_DIGEST`` in the newest revision enforces (tests/test_store.py).
"""

from __future__ import annotations

import hashlib

from sqlalchemy import Connection

_ATTEMPT_SPAN = """
SELECT a.id AS attempt_id, a.fingerprint, a.number, a.resume_step,
       LEAST_OF(
           COALESCE((SELECT MIN(b.resume_step) FROM attempt b
                     WHERE b.fingerprint = a.fingerprint AND b.number > a.number), 9223372036854775807),
           CASE WHEN t.state IN ('PRUNED', 'DIVERGED') AND t.end_step IS NOT NULL
                THEN t.end_step ELSE 9223372036854775807 END
       ) AS last_step
FROM attempt a JOIN trial t ON t.fingerprint = a.fingerprint
"""

# An evaluation at a resume step can be there twice: before the kill, and again after the resumption.
_CURVE_VALIDATION = """
SELECT p.fingerprint, p.number AS attempt, v.step, v.split, v.tokens, v.fraction, v.loss_nats, v.bits_per_byte,
       v.num_tokens, v.num_bytes, v.nonfinite
FROM attempt_span p JOIN validation v ON v.attempt_id = p.attempt_id AND v.step <= p.last_step
WHERE NOT EXISTS (SELECT 1 FROM attempt b JOIN validation w ON w.attempt_id = b.id
                  WHERE b.fingerprint = p.fingerprint AND b.number > p.number
                    AND w.step = v.step AND w.split = v.split)
"""


def _final(split: str, column: str) -> str:
    return f"""CASE WHEN t.state = 'COMPLETE' THEN (
           SELECT v.{column} FROM attempt_span p
           JOIN validation v ON v.attempt_id = p.attempt_id AND v.step <= p.last_step
           WHERE p.fingerprint = t.fingerprint AND v.split = '{split}' AND v.fraction >= 1
           ORDER BY v.step DESC, p.number DESC LIMIT 1) END"""


# Where the history that counts begins: the last attempt that went on from none of its own.
_BEGINNING = """(SELECT a.{column} FROM attempt a WHERE a.fingerprint = t.fingerprint AND a.resumed_from_attempt IS NULL
        ORDER BY a.number DESC LIMIT 1)"""

_RESULTS = f"""
SELECT s.name AS sweep, st.arm, st.axes, t.lr, st.seed, t.state, t.cause, t.reason, t.fingerprint,
       t.num_parameters, t.training_flops,
       (SELECT COUNT(*) FROM attempt a WHERE a.fingerprint = t.fingerprint) AS num_attempts,
       COALESCE((SELECT MAX((SELECT MAX(m.step) FROM step_metric m
                             WHERE m.attempt_id = p.attempt_id AND m.step <= p.last_step))
                 FROM attempt_span p WHERE p.fingerprint = t.fingerprint), 0) AS steps_done,
       t.num_steps,
       {_final("slice", "loss_nats")} AS validation_loss_nats,
       {_final("slice", "bits_per_byte")} AS bits_per_byte,
       {_final("full", "loss_nats")} AS full_validation_loss_nats,
       {_final("full", "bits_per_byte")} AS full_bits_per_byte,
       (SELECT a.tokens_per_second FROM attempt a WHERE a.fingerprint = t.fingerprint
        ORDER BY a.number DESC LIMIT 1) AS tokens_per_second,
       (SELECT SUM(a.seconds) FROM attempt a WHERE a.fingerprint = t.fingerprint) AS seconds,
       (SELECT o.name FROM attempt a JOIN sweep o ON o.id = a.sweep_id WHERE a.fingerprint = t.fingerprint
        ORDER BY a.number DESC LIMIT 1) AS trained_in,
       {_BEGINNING.format(column="branched_from")} AS branched_from,
       CASE WHEN {_BEGINNING.format(column="branched_from")} IS NOT NULL
            THEN {_BEGINNING.format(column="resume_step")} END AS branch_step,
       st.position
FROM sweep_trial st
JOIN sweep s ON s.id = st.sweep_id
JOIN trial t ON t.fingerprint = st.fingerprint
WHERE st.current
"""

_CURVES = """
SELECT s.name AS sweep, st.arm, st.axes, st.seed, t.lr, t.fingerprint, t.state, p.number AS attempt,
       m.step, m.tokens, m.fraction, m.lr AS step_lr, m.loss_nats, m.gradient_norm, m.tokens_per_second, m.nonfinite,
       v.loss_nats AS validation_loss_nats, v.bits_per_byte,
       st.position
FROM sweep_trial st
JOIN sweep s ON s.id = st.sweep_id
JOIN trial t ON t.fingerprint = st.fingerprint
JOIN attempt_span p ON p.fingerprint = t.fingerprint
JOIN step_metric m ON m.attempt_id = p.attempt_id AND m.step <= p.last_step
LEFT JOIN curve_validation v ON v.fingerprint = t.fingerprint AND v.step = m.step AND v.split = 'slice'
WHERE st.current
"""

_ATTEMPTS = """
SELECT s.name AS sweep, st.arm, st.axes, st.seed, t.lr, t.fingerprint, t.state, a.number AS attempt, a.token,
       a.cause, a.reason, a.resume_step, a.resumed_from_attempt, a.branched_from, a.end_step, a.started_at, a.ended_at,
       a.seconds, a.tokens_per_second, a.peak_memory_bytes, a.layout, a.hosts,
       a.provenance ->> 'commit' AS git_commit,
       CAST(a.provenance ->> 'dirty' AS BOOLEAN) AS git_dirty,
       a.provenance, a.log_tail, o.name AS started_by, st.position
FROM sweep_trial st
JOIN sweep s ON s.id = st.sweep_id
JOIN trial t ON t.fingerprint = st.fingerprint
JOIN attempt a ON a.fingerprint = t.fingerprint
JOIN sweep o ON o.id = a.sweep_id
WHERE st.current
"""

_DIAGNOSTICS = """
SELECT s.name AS sweep, st.arm, st.axes, st.seed, t.lr, t.fingerprint, t.state, p.number AS attempt,
       d.step, d.tokens, d.fraction, d.layer, d.first_token_attention, d.max_activation, d.gate_score,
       d.attention_output_rms, d.ffn_output_rms, d.residual_rms, d.gradient_norm, d.update_ratio, d.nonfinite,
       d.heads, d.gates, st.position
FROM sweep_trial st
JOIN sweep s ON s.id = st.sweep_id
JOIN trial t ON t.fingerprint = st.fingerprint
JOIN attempt_span p ON p.fingerprint = t.fingerprint
JOIN layer_diagnostic d ON d.attempt_id = p.attempt_id AND d.step <= p.last_step
WHERE st.current
"""

_DENOMINATORS = """
SELECT s.name AS sweep, st.arm, st.axes, st.seed, t.lr, t.fingerprint, t.state, v.attempt, v.step, v.fraction,
       v.tokens, t.training_flops * v.step / t.num_steps AS flops, t.num_parameters,
       (SELECT CASE WHEN COUNT(m.tokens_per_second) = v.step THEN SUM(t.batch_tokens / m.tokens_per_second) END
        FROM attempt_span p JOIN step_metric m ON m.attempt_id = p.attempt_id AND m.step <= p.last_step
        WHERE p.fingerprint = t.fingerprint AND m.step <= v.step AND m.tokens_per_second > 0) AS seconds,
       v.loss_nats AS validation_loss_nats, v.bits_per_byte, a.layout, a.hosts, a.cpus, a.gpus,
       a.provenance ->> 'backend' AS backend, st.position
FROM sweep_trial st
JOIN sweep s ON s.id = st.sweep_id
JOIN trial t ON t.fingerprint = st.fingerprint
JOIN curve_validation v ON v.fingerprint = t.fingerprint AND v.split = 'slice'
JOIN attempt a ON a.fingerprint = t.fingerprint AND a.number = v.attempt
WHERE st.current
"""

VIEWS = {
    "attempt_span": _ATTEMPT_SPAN,
    "curve_validation": _CURVE_VALIDATION,
    "results": _RESULTS,
    "curves": _CURVES,
    "attempts": _ATTEMPTS,
    "diagnostics": _DIAGNOSTICS,
    "denominators": _DENOMINATORS,
}
"""In the order of their making: a view may read those before it."""


def digest() -> str:
    return hashlib.sha256("".join(VIEWS.values()).encode()).hexdigest()[:16]


def drop_views(connection: Connection) -> None:
    for name in reversed(VIEWS):
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")


def create_views(connection: Connection) -> None:
    least = "MIN" if connection.dialect.name == "sqlite" else "LEAST"
    for name, body in VIEWS.items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {body.replace('LEAST_OF', least)}")
