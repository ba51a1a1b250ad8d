"""The decision table of ``failures.consequence``: what an attempt's end makes of its trial."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from models.config import Layout
from models.run_dir import Summary
from orchestrator.failures import (
    ERROR,
    NONFINITE,
    RANK_DIED,
    Consequence,
    Ending,
    Evidence,
    Wish,
    consequence,
    diagnose,
)
from orchestrator.store import AttemptRow
from orchestrator.sweep import FailureRule, RetryConfig

RETRY = RetryConfig(infrastructure=2, error=1)
RISING = Wish("divergence", "loss_above_start", "the loss was above its start", step=18)
NOT_FINITE = Wish("divergence", NONFINITE, "the training loss at step 7 is not finite", step=7)
CTRL_C = Wish("interrupted", "interrupted", "SIGINT")
OUT_OF_TIME = Wish("budget", "budget", "budget.wall_hours 1 is used up")


def summary(outcome: str, step: int = 40, error: str | None = None) -> Summary:
    return Summary.model_validate(
        {
            "outcome": outcome,
            "step": step,
            "resume_step": 0,
            "seconds": 1.0,
            "tokens_per_second": 100.0,
            "error": error,
        }
    )


def attempt(number: int, cause: str | None, end_step: int | None = None) -> AttemptRow:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return AttemptRow(
        id=number, fingerprint="f" * 16, number=number, token="t", sweep_id=1, layout=Layout(), hosts=(),
        provenance={}, resume_step=0, resumed_from=None, branched_from=None, started_at=moment, ended_at=moment,
        cause=cause, reason=None, end_step=end_step, seconds=1.0, tokens_per_second=None, peak_memory_bytes=None,
        log_tail=None, cpus=1.0, gpus=0.0, held_seconds=1.0,
    )  # fmt: skip


def causes(*names: str) -> list[AttemptRow]:
    return [attempt(number, name) for number, name in enumerate(names, start=1)]


COMPLETE = Ending(summary("complete"), None, rank_died=False, wish=None)
STOPPED = Ending(summary("stopped", 22), None, rank_died=False, wish=None)
DIED = Ending(None, "process 7 of a rank died", rank_died=True, wish=None)
RAISED = Ending(None, "CorpusError: the corpus has changed", rank_died=False, wish=None)
BLEW_UP = Ending(summary("nonfinite", 7, "loss nan, gradient norm nan at step 7"), None, rank_died=False, wish=None)
VANISHED = Ending(None, None, rank_died=False, wish=None)

EVERY_END = {
    "complete": COMPLETE,
    "stopped": STOPPED,
    "died": DIED,
    "raised": RAISED,
    "nonfinite": BLEW_UP,
    "vanished": VANISHED,
}


def after(
    ending: Ending, earlier: Sequence[AttemptRow] = (), wish: Wish | None = None, retry: RetryConfig = RETRY
) -> Consequence:
    return consequence(Ending(ending.summary, ending.error, ending.rank_died, wish), earlier, retry)


def test_a_complete_attempt_completes_its_trial():
    assert after(COMPLETE) == Consequence("COMPLETE", "complete", "all 40 steps", 40)


@pytest.mark.parametrize("wish", [CTRL_C, OUT_OF_TIME], ids=lambda wish: wish.kind)
def test_a_trial_that_completes_after_it_was_told_to_stop_is_complete(wish: Wish):
    assert after(COMPLETE, wish=wish).state == "COMPLETE"


@pytest.mark.parametrize("end", EVERY_END)
def test_a_divergence_rule_decides_whatever_the_attempt_did_after_it_fired(end: str):
    result = after(EVERY_END[end], wish=RISING)
    assert result == Consequence("DIVERGED", "loss_above_start", "the loss was above its start", 18)


@pytest.mark.parametrize("end", EVERY_END)
def test_divergence_does_not_hang_on_used_up_budgets(end: str):
    earlier = causes(RANK_DIED, RANK_DIED, RANK_DIED, ERROR, ERROR, NONFINITE)
    assert after(EVERY_END[end], earlier, wish=RISING).state == "DIVERGED"


@pytest.mark.parametrize("end", ["stopped", "died", "raised", "nonfinite", "vanished", "complete"])
def test_the_first_number_that_is_not_finite_is_resumed_whoever_saw_it_and_however_it_ended(end: str):
    result = after(EVERY_END[end], wish=NOT_FINITE)
    assert (result.state, result.cause, result.end_step) == ("WAITING", NONFINITE, 7)
    assert "resumed once" in result.reason


def test_the_trainers_own_word_on_a_number_that_is_not_finite_is_enough():
    result = after(BLEW_UP)
    assert (result.state, result.cause, result.end_step) == ("WAITING", NONFINITE, 7)
    assert "loss nan" in result.reason


@pytest.mark.parametrize(("first_step", "words"), [(7, "the same step"), (5, "step 7 after step 5")])
def test_not_finite_again_is_divergence_at_the_same_step_and_at_another(first_step: int, words: str):
    result = after(BLEW_UP, [attempt(1, NONFINITE, first_step)])
    assert (result.state, result.cause, result.end_step) == ("DIVERGED", NONFINITE, 7)
    assert words in result.reason


def test_not_finite_is_remembered_over_attempts_that_ended_otherwise():
    earlier = [attempt(1, NONFINITE, 7), attempt(2, RANK_DIED), attempt(3, "interrupted")]
    assert after(BLEW_UP, earlier).state == "DIVERGED"


@pytest.mark.parametrize("wish", [CTRL_C, OUT_OF_TIME], ids=lambda wish: wish.kind)
@pytest.mark.parametrize("end", ["stopped", "died", "raised", "vanished"])
def test_a_stopped_sweep_leaves_its_trials_waiting_with_every_budget_untouched(end: str, wish: Wish):
    earlier = causes(RANK_DIED, RANK_DIED, ERROR)
    result = after(EVERY_END[end], earlier, wish=wish)
    assert (result.state, result.cause, result.reason) == ("WAITING", wish.kind, wish.reason)
    # The attempt is in no group that a budget counts.
    assert after(DIED, [attempt(1, result.cause)], retry=RetryConfig(infrastructure=1)).state == "WAITING"
    assert after(RAISED, [attempt(1, result.cause)], retry=RetryConfig(error=1)).state == "WAITING"


def test_not_finite_counts_also_when_the_sweep_is_being_stopped():
    assert after(BLEW_UP, wish=CTRL_C).cause == NONFINITE
    assert after(BLEW_UP, [attempt(1, NONFINITE, 7)], wish=CTRL_C).state == "DIVERGED"


def test_a_dead_rank_is_retried_until_the_infrastructure_budget_is_used_up():
    states = [after(DIED, causes(*[RANK_DIED] * spent)) for spent in range(4)]
    assert [one.state for one in states] == ["WAITING", "WAITING", "FAILED", "FAILED"]
    assert [one.cause for one in states] == [RANK_DIED] * 4
    assert states[0].reason == "process 7 of a rank died; retry 1 of 2"
    assert states[1].reason == "process 7 of a rank died; retry 2 of 2"
    assert states[2].reason == "process 7 of a rank died; all 2 retries used"


@pytest.mark.parametrize("end", ["raised", "vanished"])
def test_an_error_of_the_users_is_not_retried_by_default(end: str):
    result = after(EVERY_END[end], retry=RetryConfig())
    assert (result.state, result.cause) == ("FAILED", ERROR)
    assert result.reason.endswith("; no retry allowed")


def test_an_error_is_retried_as_often_as_the_sweep_allows():
    assert after(RAISED, retry=RetryConfig(error=1)).state == "WAITING"
    result = after(RAISED, causes(ERROR), retry=RetryConfig(error=1))
    assert (result.state, result.cause) == ("FAILED", ERROR)
    assert result.reason == "CorpusError: the corpus has changed; the only retry is used"


def test_the_two_budgets_are_separate():
    assert after(RAISED, causes(RANK_DIED, RANK_DIED, RANK_DIED)).state == "WAITING"
    assert after(DIED, causes(ERROR, ERROR, ERROR)).state == "WAITING"


@pytest.mark.parametrize("cause", ["controller_lost", "interrupted", "budget", NONFINITE, None])
def test_ends_that_are_nobodys_fault_count_against_no_budget(cause: str | None):
    earlier = [attempt(number, cause) for number in range(1, 9)]
    assert after(DIED, earlier, retry=RetryConfig(infrastructure=1)).state == "WAITING"
    assert after(RAISED, earlier, retry=RetryConfig(error=1)).state == "WAITING"


def seen(error: str = "", log: str = "", exit_code: int | None = None, rank_died: bool = False) -> Evidence:
    return Evidence(error, log, exit_code, rank_died)


# As Ray, torch, gloo, NCCL and the driver of a GPU say it.
WORDS = {
    "OSError: [Errno 28] No space left on device": "disk_full",
    "OSError: [Errno 30] Read-only file system: '/scratch/attempt.json'": "disk_read_only",
    "OSError: [Errno 122] Disk quota exceeded: '/scratch/step_00000100'": "disk_full",
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB": "gpu_out_of_memory",
    "AcceleratorError: CUDA error: out of memory": "gpu_out_of_memory",
    "OutOfMemoryError: Task was killed due to the node running low on memory.": "host_out_of_memory",
    "AcceleratorError: CUDA error: uncorrectable ECC error encountered": "hardware",
    "DistBackendError: [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)": "collective_timeout",
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv": "collective_timeout",
    "CheckpointError: /runs/trials/x/step_00000010 is torn": "corrupt_checkpoint",
    "UntrustedCheckpoint: checkpoint /runs/trials/x/step_00000010 was not opened": "untrusted_files",
    "Untrusted: index cache /runs/data/x is not as it was written": "untrusted_files",
    "SystemExit: 16": "error",
    "ValueError: a mistake": "error",
}


@pytest.mark.parametrize("words", WORDS)
def test_causes_are_told_from_the_words_that_the_stack_uses(words: str):
    assert diagnose(seen(words)).name == WORDS[words]


@pytest.mark.parametrize(("code", "cause", "faults"), [(16, "megatron_restart", 1), (17, "megatron_exclude", 2)])
def test_megatrons_exit_codes_are_the_machines_fault(code: int, cause: str, faults: int):
    found = diagnose(seen(f"SystemExit: {code}", exit_code=code))
    assert (found.name, found.counts_as, found.host_faults) == (cause, "infrastructure", faults)


def test_a_line_of_the_driver_in_the_log_names_the_hardware():
    log = "step 12\nNVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus\n"
    found = diagnose(seen("RuntimeError: CUDA error: an illegal memory access", log))
    assert (found.name, found.host_faults) == ("hardware", 2)


def test_a_dead_rank_without_further_words_is_just_that():
    assert diagnose(seen("process 7 of a rank died: Worker unexpectedly exits", rank_died=True)).name == RANK_DIED


def test_a_sweeps_own_rules_come_first_and_all_their_evidence_must_match():
    rule = FailureRule(cause="stale_nfs", error="OSError", log="Stale file handle", counts_as="infrastructure")
    assert diagnose(seen("OSError: 116", "x Stale file handle"), [rule]).name == "stale_nfs"
    assert diagnose(seen("OSError: 116", "all is well"), [rule]).name == ERROR
    full = FailureRule(cause="our_quota", error="No space left", counts_as="never_again")
    assert diagnose(seen("OSError: No space left on device"), [full]).name == "our_quota"


def test_rules_of_the_sweep_are_charged_to_the_budget_they_name():
    rule = FailureRule(cause="stale_nfs", error="Stale", counts_as="infrastructure")
    retry = RetryConfig(infrastructure=2, error=0, rules=(rule,))
    stale = Ending(None, "OSError: Stale file handle", rank_died=False, wish=None)
    assert after(stale, causes(RANK_DIED), retry=retry).reason.endswith("retry 2 of 2")
    result = after(stale, causes("stale_nfs", RANK_DIED), retry=retry)
    assert (result.state, result.cause) == ("FAILED", "stale_nfs")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"cause": "x"}, "looks at nothing; allowed: error, log, exit_code"),
        ({"cause": "x", "log": "(a"}, r"is no RE2 pattern: missing \)"),
        ({"cause": "x", "log": r"(a)\1"}, "is no RE2 pattern: invalid escape sequence"),
        ({"cause": "Two Words", "log": "a"}, "String should match pattern"),
    ],
)
def test_a_rule_that_can_never_match_is_refused(rule: dict[str, str], words: str):
    with pytest.raises(ValueError, match=words):
        FailureRule.model_validate(rule)


def test_patterns_take_linear_time():
    """A backtracking engine would need longer than the universe has."""
    rule = FailureRule(cause="slow", log="(a*)*b")
    assert diagnose(seen(log="a" * 16_384), [rule]).name == ERROR


def test_out_of_gpu_memory_is_never_retried():
    ending = Ending(None, "OutOfMemoryError: CUDA out of memory.", rank_died=False, wish=None)
    result = after(ending, retry=RetryConfig(error=9, infrastructure=9))
    assert (result.state, result.cause) == ("FAILED", "gpu_out_of_memory")
    assert result.reason.endswith("never retried")


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (STOPPED, "preempted"),
        (Ending(None, "OSError: [Errno 28] No space left on device", rank_died=False, wish=None), "disk_full"),
    ],
)
def test_preemption_and_a_full_disk_count_against_no_budget(ending: Ending, cause: str):
    retry = RetryConfig(infrastructure=0, error=0)
    for earlier in ((), causes(*[cause] * 50)):
        result = after(ending, earlier, retry=retry)
        assert (result.state, result.cause, result.delay_seconds) == ("WAITING", cause, 0.0)


def test_each_further_retry_waits_twice_as_long_and_never_longer_than_five_minutes():
    retry = RetryConfig(infrastructure=99, backoff_seconds=2.0)
    delays = [after(DIED, causes(*[RANK_DIED] * spent), retry=retry).delay_seconds for spent in (0, 1, 2, 3, 20)]
    assert delays == [2.0, 4.0, 8.0, 16.0, 300.0]


def test_a_hang_is_the_machines_fault_and_retried():
    hang = Wish("hang", "hang", "hung: nothing done for 900 s after step 3")
    result = after(Ending(None, "hung", rank_died=False, wish=None), wish=hang)
    assert (result.state, result.cause) == ("WAITING", "hang")
    assert after(DIED, causes("hang", "hang"), wish=None).state == "FAILED"
