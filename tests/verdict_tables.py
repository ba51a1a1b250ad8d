"""A small sweep's trials, and the table that they become."""

import math
import random

from store_backends import postgres_server, store_url  # noqa: F401

from orchestrator.report import (
    SweepHeading,
    TrialResult,
    tabulate,
)

ARMS = {"baseline": (2.41, 820_608), "g1-elementwise": (2.395, 821_632), "g1-headwise": (2.404, 819_584)}
ARMS |= {"g2-elementwise": (2.412, 819_584)}
QUESTION = "Does a gate on the attention output lower the loss at equal parameters?"


def heading(seeds=(1, 2), arms=tuple(ARMS), **changes):
    return SweepHeading("quickstart", QUESTION, "baseline", arms, seeds, 0.01, 0.05, ("train.lr",), **changes)


def trial(arm="baseline", lr=4e-3, seed=1, loss=None, state=None, **changes):
    axes = {"train.lr": lr, **changes.pop("axes", {})}
    given = TrialResult(
        fingerprint=f"{arm}/{'/'.join(map(str, axes.values()))}/{seed}",
        arm=arm,
        axes=axes,
        lr=lr,
        seed=seed,
        state=state or ("COMPLETE" if loss is not None else "DIVERGED"),
        num_parameters=820_608,
        training_flops=5.3e11,
        num_attempts=1,
        slice_loss_nats=loss,
        slice_bits_per_byte=None if loss is None else loss / math.log(2),
        tokens_per_second=None if loss is None else 5000.0 + seed,
    )
    return given._replace(**changes)


def quickstart(seeds=(1, 2), shuffle=0):
    """Four arms, three learning rates of which 1.0 diverges: what the quick start is like."""
    rng = random.Random(4)
    trials = []
    for arm, (mean, num_parameters) in ARMS.items():
        for seed in seeds:
            for lr, above in ((1e-3, 0.2), (4e-3, 0.0), (1.0, None)):
                loss = None if above is None else mean + above + rng.gauss(0, 0.01)
                trials.append(trial(arm, lr, seed, loss, num_parameters=num_parameters))
    return random.Random(shuffle).sample(trials, len(trials))


def swap(trials, arm, lr, seed, **changes):
    """The same trials, one of them changed."""
    hit = [(t.arm, t.lr, t.seed) == (arm, lr, seed) for t in trials]
    assert sum(hit) == 1
    return [t._replace(**changes) if is_it else t for t, is_it in zip(trials, hit, strict=True)]


def failed(trials, arm, lr, seed, state="FAILED", **changes):
    return swap(trials, arm, lr, seed, state=state, slice_loss_nats=None, slice_bits_per_byte=None, **changes)


def table_of(trials, **changes):
    (table,) = tabulate(heading(**changes), trials).tables
    return table


def row_of(trials, arm, **changes):
    return next(row for row in table_of(trials, **changes).rows if row.arm == arm)


def note(table, start):
    found = [text for text in table.footnotes if text.startswith(start)]
    return found[0] if found else None
