"""What the end of an attempt means for its job: one decision, made from facts alone."""

from dataclasses import dataclass
from typing import Literal

from bento_service.jobs.job import JobError, JobStatus
from bento_service.jobs.launcher import Exit
from bento_service.training.run_directory import Outcome

# Why the supervisor asked a trainer to stop.
StopReason = Literal["cancel", "pause", "drain", "run_time", "idle"]


@dataclass(frozen=True)
class Verdict:
    to: JobStatus
    message: str  # of the state event
    error: JobError | None = None
    retry_after: float = 0.0  # seconds until the next attempt, for a job that is queued again
    infrastructure: bool = False  # counts against the limit of attempts


def judge(
    *,
    attempt: int,
    failures: int,
    exit: Exit,
    stop: StopReason | None,
    outcome: Outcome | None,
    log_tail: list[str],
    max_attempts: int,
    backoff_seconds: float,
    max_run_seconds: float | None = None,
) -> Verdict:
    """Decide from how the process ended, what was asked of it, and what it says itself.

    ``failures`` are the earlier attempts that infrastructure ended. A job that succeeded has succeeded, whatever
    was asked meanwhile; a user's error is final at once; a full disk pauses the job, since trying again helps
    nobody until there is room.
    """
    if outcome is not None and outcome.status == "succeeded":
        return Verdict(JobStatus.SUCCEEDED, "The job has been completed")
    if stop == "cancel":
        return Verdict(JobStatus.CANCELLED, "Job cancelled on request")
    if outcome is not None and outcome.status == "failed":
        reason = outcome.message or "the trainer gave no reason"
        if outcome.code == "disk_full":
            return Verdict(JobStatus.PAUSED, f"Paused: {reason}. The last checkpoint is kept.")
        if not outcome.retryable:
            error = JobError(code=outcome.code or "training_failed", message=reason, param=outcome.param)
            return Verdict(JobStatus.FAILED, f"Training failed: {reason}", error)
    if stop == "pause":
        return Verdict(JobStatus.PAUSED, "Job paused on request; its device is free")
    if stop == "drain":
        return Verdict(JobStatus.QUEUED, "Service stopping: the job is queued again")
    if stop == "run_time":
        reason = f"The job ran longer than its limit of {max_run_seconds:g} s; its checkpoints are kept."
        return Verdict(JobStatus.FAILED, reason, JobError(code="run_time_exceeded", message=reason))
    cause = _cause(exit, stop, outcome)
    if failures + 1 < max_attempts:
        wait = backoff_seconds * 2**failures
        message = f"Attempt {attempt} ended, {cause}; the next one starts in {wait:g} s"
        return Verdict(JobStatus.QUEUED, message, retry_after=wait, infrastructure=True)
    tail = "\n".join(log_tail) or "(the log is empty)"
    error = JobError(
        code="trainer_died" if outcome is None else outcome.code or "training_failed",
        message=f"Given up after {failures + 1} attempts: {cause}. The log ends with:\n{tail}",
    )
    return Verdict(JobStatus.FAILED, f"Given up after {failures + 1} attempts: {cause}", error, infrastructure=True)


def _cause(exit: Exit, stop: StopReason | None, outcome: Outcome | None) -> str:
    if stop == "idle":
        return "the trainer made no progress"
    if outcome is None:
        return f"the trainer died: {exit.describe()}"
    if outcome.status == "stopped":
        return "the trainer was stopped, not by this service"
    return outcome.message or "the trainer failed"
