"""The process that runs jobs: claims them, launches trainers, carries their events into the store.

``python -m bento_service.jobs.supervisor``. One a host and TRL_HOME: a file lock that dies with its owner decides,
others wait. SIGTERM drains: trainers checkpoint and their jobs are queued again. When the parent that started it
dies (its standard input closes), it ends at once and leaves the trainers running for the next supervisor to adopt.
"""

import fcntl
import json
import os
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog

from bento_service.jobs.devices import Devices, visible_devices
from bento_service.jobs.job import Job, JobError, JobStatus, Lease
from bento_service.jobs.launcher import AdoptedTrainer, Exit, LaunchedTrainer, Trainer, is_alive
from bento_service.jobs.store import LeaseLost, Store
from bento_service.settings import Settings, get_settings
from bento_service.training.events import read_events
from bento_service.training.run_directory import Outcome, RunDirectory, write_durably

log = structlog.get_logger("supervisor")

StopReason = Literal["cancel", "pause", "drain"]


@dataclass
class Run:
    """One job that this supervisor holds."""

    job: Job
    lease: Lease
    directory: RunDirectory
    trainer: Trainer
    devices: tuple[str, ...]
    offset: int
    renewed_at: float
    stop: StopReason | None = None
    kill_at: float | None = None  # monotonic
    last_event_at: float = field(default_factory=time.monotonic)


class Supervisor:
    """Keeps the jobs of one host moving. Everything it knows is in the store or the run directories."""

    def __init__(self, settings: Settings, store: Store, *, devices: Devices | None = None) -> None:
        self.settings = settings
        self.store = store
        self.devices = devices or visible_devices(settings)
        self.host = socket.gethostname()
        self.owner = f"{self.host}:{os.getpid()}:{time.time():.3f}"
        self.draining = False
        self.runs: dict[str, Run] = {}

    # --------------------------------------------------------------- lifetime

    def reconcile(self) -> None:
        """Before anything is claimed: take over what an earlier supervisor of this host left running."""
        for job, attempt in self.store.running(host=self.host):
            lease = self.store.adopt(
                job.id, self.owner, lease_seconds=self.settings.lease_seconds, from_token=job.lease_token
            )
            if lease is None:
                continue
            pid, created_at = attempt.pid, attempt.pid_created_at
            run = Run(
                job=job,
                lease=lease,
                directory=self._directory(job),
                trainer=AdoptedTrainer(pid or -1, created_at or 0.0),
                devices=tuple(attempt.devices),
                offset=self.store.event_offset(lease),
                renewed_at=time.monotonic(),
            )
            self.runs[job.id] = run
            alive = pid is not None and created_at is not None and is_alive(pid, created_at)
            log.info("job taken over", job=job.id, trainer_alive=alive)
            if alive:
                self.store.note(lease, f"Supervisor restarted: trainer {pid} is still running and was adopted")

    def step(self) -> None:
        """One round over all that is running and all that waits."""
        self._reclaim_stale()
        for run in list(self.runs.values()):
            try:
                self._attend(run)
            except LeaseLost as lost:
                log.warning("lease lost, trainer ended", job=run.job.id, reason=str(lost))
                run.trainer.kill()
                del self.runs[run.job.id]
        while not self.draining and self._claim_next():
            pass

    def drain(self) -> None:
        """Claim nothing more; ask every trainer to checkpoint and end. ``step`` sees it through."""
        self.draining = True
        for run in self.runs.values():
            if run.stop is None:
                self._ask_to_stop(run, "drain")

    # ---------------------------------------------------------------- running

    def _attend(self, run: Run) -> None:
        now = time.monotonic()
        if now - run.renewed_at >= self.settings.heartbeat_seconds:
            self.store.heartbeat(run.lease, lease_seconds=self.settings.lease_seconds)
            run.renewed_at = now
        wanted = self.store.wanted([run.lease])
        if run.job.id not in wanted:
            raise LeaseLost(f"lease {run.lease.token} on {run.job.id} is over")
        exit = run.trainer.poll()  # before the events, so that those of a dead trainer are all read
        self._carry_events(run)
        asked = wanted[run.job.id]
        if exit is not None:
            self._conclude(run, exit, "cancel" if asked == "cancel" else run.stop or asked)
        elif asked is not None and run.stop != asked:
            self._ask_to_stop(run, "cancel" if asked == "cancel" else "pause")
        elif run.kill_at is not None and now >= run.kill_at:
            self.store.note(
                run.lease,
                f"The trainer did not end within {self.settings.grace_seconds:g} s and was killed",
                level="warn",
            )
            run.trainer.kill()
            run.kill_at = None

    def _carry_events(self, run: Run) -> None:
        while True:
            events, offset = read_events(run.directory.events_file, run.offset)
            if not events:
                return
            self.store.record(run.lease, events, offset=offset)
            run.offset = offset
            run.last_event_at = time.monotonic()

    def _ask_to_stop(self, run: Run, reason: StopReason) -> None:
        first = run.stop is None
        run.stop = reason
        if first:
            run.trainer.terminate()
            run.kill_at = time.monotonic() + self.settings.grace_seconds

    def _conclude(self, run: Run, exit: Exit, stop: str | None) -> None:
        """The trainer is gone: decide what its end means for the job."""
        outcome = run.directory.read_outcome(run.job.attempt)
        to, message, error, retry_after, infrastructure = self._verdict(run, exit, stop, outcome)
        self.store.finish(
            run.lease,
            to,
            message,
            error=error,
            exit_code=exit.code,
            signal=exit.signal,
            retry_after=retry_after,
            infrastructure=infrastructure,
        )
        run.trainer.kill()  # whatever the trainer left behind in its process group
        del self.runs[run.job.id]
        log.info("attempt ended", job=run.job.id, attempt=run.job.attempt, to=to.value, reason=message)

    def _verdict(
        self, run: Run, exit: Exit, stop: str | None, outcome: Outcome | None
    ) -> tuple[JobStatus, str, JobError | None, float, bool]:
        """Next state, event message, error, back-off in seconds, and whether infrastructure was to blame."""
        if outcome is not None and outcome.status == "succeeded":
            return JobStatus.SUCCEEDED, "The job has been completed", None, 0.0, False
        if outcome is not None and outcome.status == "failed" and not outcome.retryable:
            error = JobError(
                code=outcome.code or "training_failed", message=outcome.message or "", param=outcome.param
            )
            return JobStatus.FAILED, f"Training failed: {error.message}", error, 0.0, False
        if stop == "cancel":
            return JobStatus.CANCELLED, "Job cancelled on request", None, 0.0, False
        if stop == "pause":
            return JobStatus.PAUSED, "Job paused on request; its device is free", None, 0.0, False
        if stop == "drain":
            return JobStatus.QUEUED, "Service stopping: the job is queued again", None, 0.0, False
        if outcome is not None and outcome.status == "failed":
            cause = outcome.message or "the trainer failed"
        elif outcome is not None:
            cause = "the trainer was stopped by a signal from outside the service"
        else:
            cause = f"the trainer died: {exit.describe()}"
        failures = self.store.failures(run.job.id) + 1
        if failures < self.settings.max_attempts:
            wait = self.settings.retry_backoff_seconds * 2 ** (failures - 1)
            message = f"Attempt {run.job.attempt} ended, {cause}; the next one starts in {wait:g} s"
            return JobStatus.QUEUED, message, None, wait, True
        tail = "\n".join(run.directory.log_tail())
        error = JobError(
            code="trainer_died" if outcome is None else outcome.code or "training_failed",
            message=f"Given up after {failures} attempts: {cause}. The log ends with:\n{tail or '(the log is empty)'}",
        )
        return JobStatus.FAILED, f"Given up after {failures} attempts: {cause}", error, 0.0, True

    # --------------------------------------------------------------- claiming

    def _claim_next(self) -> bool:
        taken = {device for run in self.runs.values() for device in run.devices}
        free = [device for device in self.devices.ids if device not in taken]
        if not free:
            return False
        job = self.store.claim(
            self.owner, host=self.host, free_devices=len(free), lease_seconds=self.settings.lease_seconds
        )
        if job is None:
            return False
        lease = Lease(job_id=job.id, token=job.lease_token)
        devices = tuple(free[: job.devices])
        directory = self._directory(job)
        try:
            directory.write_spec(job.spec)
            trainer = LaunchedTrainer(
                directory,
                command=shlex.split(self.settings.trainer_command or ""),
                attempt=job.attempt,
                devices=devices,
                kind=self.devices.kind,
                threads=self._threads(),
            )
        except OSError as error:
            # The run directory cannot be written or no process be started: this host's trouble, not the job's.
            log.error("launch failed", job=job.id, error=str(error))
            self._conclude_unlaunched(job, lease, error)
            return True
        self.store.launched(lease, pid=trainer.pid, pid_created_at=trainer.created_at, devices=devices)
        trainer.go()
        self.runs[job.id] = Run(
            job=job,
            lease=lease,
            directory=directory,
            trainer=trainer,
            devices=devices,
            offset=self.store.event_offset(lease),
            renewed_at=time.monotonic(),
        )
        log.info("trainer started", job=job.id, attempt=job.attempt, pid=trainer.pid, devices=devices)
        return True

    def _conclude_unlaunched(self, job: Job, lease: Lease, error: OSError) -> None:
        failures = self.store.failures(job.id) + 1
        wait = self.settings.retry_backoff_seconds * 2 ** (failures - 1)
        final = failures >= self.settings.max_attempts
        self.store.finish(
            lease,
            JobStatus.FAILED if final else JobStatus.QUEUED,
            f"The trainer could not be started: {error}",
            error=JobError(code="launch_failed", message=str(error)) if final else None,
            retry_after=wait,
            infrastructure=True,
        )

    def _reclaim_stale(self) -> None:
        """Jobs of supervisors that stopped renewing their leases, on this host or another."""
        for job, attempt in self.store.running(stale_at=time.time()):
            if job.id in self.runs:
                continue
            lease = self.store.adopt(
                job.id, self.owner, lease_seconds=self.settings.lease_seconds, from_token=job.lease_token
            )
            if lease is not None:
                log.warning("stale lease taken over", job=job.id, host=attempt.host)
                self.store.finish(
                    lease,
                    JobStatus.CANCELLED if job.wanted == "cancel" else JobStatus.QUEUED,
                    f"The supervisor on {attempt.host} was lost; its lease has run out",
                    infrastructure=True,
                )

    def _directory(self, job: Job) -> RunDirectory:
        return RunDirectory(self.settings.runs_path / job.id)

    def _threads(self) -> int | None:
        """CPU threads of one trainer, where several share the cores."""
        if self.devices.kind != "cpu" or self.devices.count == 1:
            return None
        return max(1, (os.cpu_count() or 1) // self.devices.count)


def heartbeat_file(settings: Settings) -> Path:
    """Where this host's supervisor says that it lives."""
    return settings.home / f"supervisor-{socket.gethostname()}.json"


def hold_lock(settings: Settings, abandoned: Callable[[], bool]) -> int | None:
    """Wait for this host's supervisor lock; None when ``abandoned`` came true first. Closing the fd releases it."""
    settings.home.mkdir(parents=True, exist_ok=True)
    fd = os.open(settings.home / f"supervisor-{socket.gethostname()}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if abandoned():
                os.close(fd)
                return None
            time.sleep(settings.poll_seconds)


def main() -> int:
    settings = get_settings()
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Parents hold the other end of standard input open and never write: readable means gone.
    watch_parent = not sys.stdin.isatty()

    def orphaned() -> bool:
        return watch_parent and bool(select.select([sys.stdin], [], [], 0)[0])

    lock = hold_lock(settings, lambda: stopping or orphaned())
    if lock is None:
        return 0
    store = Store.open(settings.sqlalchemy_url)
    supervisor = Supervisor(settings, store)
    log.info("supervisor started", home=str(settings.home), devices=supervisor.devices.describe())
    supervisor.reconcile()
    beat = 0.0
    while True:
        if stopping and not supervisor.draining:
            log.info("draining", running=len(supervisor.runs))
            supervisor.drain()
        if not stopping and orphaned():
            log.warning("parent gone, handing over", running=len(supervisor.runs))
            return 0
        supervisor.step()
        if supervisor.draining and not supervisor.runs:
            return 0
        if time.monotonic() - beat >= min(settings.heartbeat_seconds, 1.0):
            beat = time.monotonic()
            state = {"pid": os.getpid(), "time": time.time(), "draining": supervisor.draining}
            write_durably(heartbeat_file(settings), json.dumps(state))
        time.sleep(settings.poll_seconds)


if __name__ == "__main__":
    sys.exit(main())
