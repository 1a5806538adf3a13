"""What the end of an attempt means, case by case."""

import pytest

from bento_service.jobs.job import JobStatus
from bento_service.jobs.launcher import Exit
from bento_service.jobs.verdict import judge
from bento_service.training.run_directory import Outcome


def outcome(status, **values):
    return Outcome(attempt=1, status=status, **values)


def end(**changes):
    facts = {
        "attempt": 1,
        "failures": 0,
        "exit": Exit(code=0),
        "stop": None,
        "outcome": None,
        "log_tail": ["last words"],
        "max_attempts": 3,
        "backoff_seconds": 5.0,
        "max_run_seconds": 60.0,
    }
    return judge(**(facts | changes))


@pytest.mark.parametrize(
    ("facts", "to"),
    [
        ({"outcome": outcome("succeeded")}, JobStatus.SUCCEEDED),
        ({"outcome": outcome("succeeded"), "stop": "cancel"}, JobStatus.SUCCEEDED),
        ({"outcome": outcome("stopped"), "stop": "cancel"}, JobStatus.CANCELLED),
        ({"exit": Exit(signal=9), "stop": "cancel"}, JobStatus.CANCELLED),
        ({"outcome": outcome("failed", message="m"), "stop": "cancel"}, JobStatus.CANCELLED),
        ({"outcome": outcome("stopped"), "stop": "pause"}, JobStatus.PAUSED),
        ({"exit": Exit(signal=9), "stop": "pause"}, JobStatus.PAUSED),
        ({"outcome": outcome("stopped"), "stop": "drain"}, JobStatus.QUEUED),
        ({"outcome": outcome("failed", message="bad rows"), "stop": "drain"}, JobStatus.FAILED),
        ({"outcome": outcome("stopped"), "stop": "run_time"}, JobStatus.FAILED),
        ({"outcome": outcome("failed", message="bad rows")}, JobStatus.FAILED),
        ({"outcome": outcome("failed", message="full", code="disk_full", retryable=True)}, JobStatus.PAUSED),
        ({"outcome": outcome("failed", message="m", retryable=True)}, JobStatus.QUEUED),
        ({"exit": Exit(signal=9)}, JobStatus.QUEUED),
        ({"exit": Exit()}, JobStatus.QUEUED),
        ({"outcome": outcome("stopped")}, JobStatus.QUEUED),
        ({"outcome": outcome("stopped"), "stop": "idle"}, JobStatus.QUEUED),
        ({"exit": Exit(signal=9), "failures": 2}, JobStatus.FAILED),
    ],
)
def test_where_the_job_goes(facts, to):
    verdict = end(**facts)
    assert verdict.to is to
    assert (verdict.error is not None) == (to is JobStatus.FAILED)


def test_back_off_doubles_and_only_infrastructure_counts():
    assert [end(exit=Exit(signal=9), failures=n, max_attempts=9).retry_after for n in range(4)] == [5, 10, 20, 40]
    assert end(exit=Exit(signal=9)).infrastructure
    assert not end(outcome=outcome("stopped"), stop="drain").infrastructure


def test_the_last_failure_names_signal_and_log():
    verdict = end(exit=Exit(signal=9), failures=2)
    assert verdict.error.code == "trainer_died"
    assert "SIGKILL" in verdict.error.message and "last words" in verdict.error.message


def test_the_run_time_limit_is_named():
    assert "60 s" in end(outcome=outcome("stopped"), stop="run_time").error.message
