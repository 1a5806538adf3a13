"""Keeps the jobs of one host moving: claims them, launches trainers, carries their events into the store."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy.exc import SQLAlchemyError

from bento_service.errors import InvalidRequest, UnreadableRun
from bento_service.files import FileStorage
from bento_service.jobs import result_files, trainer_log
from bento_service.jobs.devices import Devices, visible_devices
from bento_service.jobs.disk import disk_need
from bento_service.jobs.job import Attempt, Job, JobError, JobStatus, Lease
from bento_service.jobs.launcher import (
    NO_TRAINER,
    AdoptedTrainer,
    Exit,
    LaunchedTrainer,
    SpareTrainer,
    Trainer,
    trainer_environment,
)
from bento_service.jobs.spares import SpareTrainers
from bento_service.jobs.store import LeaseLost, Store
from bento_service.jobs.verdict import StopReason, judge
from bento_service.settings import Settings
from bento_service.training import lease as trainer_lease
from bento_service.training.events import read_events
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spare import Orders
from bento_service.training.spec import TrainingSpec
from bento_service.training.threads import available_cpus

log = structlog.get_logger("supervisor")


@dataclass
class Run:
    """One job that this supervisor holds. Times are monotonic."""

    job: Job
    lease: Lease
    directory: RunDirectory
    trainer: Trainer
    devices: tuple[str, ...]
    offset: int  # bytes of events.jsonl already in the store
    ran_before: float  # seconds of earlier attempts
    started: float
    renewed: float
    last_event: float
    stop: StopReason | None = None
    kill_at: float | None = None
    idle_reported: bool = False
    trains: bool = False  # past imports and loading
    wanted: str | None = field(default=None)
    publish_at: float = 0.0  # not before: a disk that was full is left alone for a while


class Supervisor:
    """Everything it knows is in the store or the run directories: another one can take over at any time."""

    def __init__(self, settings: Settings, store: Store, *, devices: Devices | None = None) -> None:
        self.settings = settings
        self.store = store
        self.devices = devices or visible_devices(settings)
        self.host = settings.host_name
        self.owner = f"{self.host}:{os.getpid()}:{time.time():.3f}"
        self.draining = False
        self.runs: dict[str, Run] = {}
        self.spares = SpareTrainers(
            0 if settings.trainer_command else settings.warm_trainers, self._environment(self.devices.ids)
        )

    def reconcile(self) -> None:
        """Before anything is claimed: take over what an earlier supervisor of this host left running."""
        for job, attempt in self.store.running(host=self.host):
            lease = self.store.adopt(
                job.id, self.owner, lease_seconds=self.settings.lease_seconds, from_token=job.lease_token
            )
            if lease is None:
                continue
            trainer = NO_TRAINER
            if attempt.pid is not None and attempt.pid_created_at is not None:
                trainer = AdoptedTrainer(attempt.pid, attempt.pid_created_at)
            self._hold(job, lease, trainer, attempt)
            self.runs[job.id].trains = True
            log.info("job taken over", job=job.id, trainer=trainer.pid, alive=trainer.poll() is None)
            if trainer.poll() is None:
                trainer_lease.renew(self._directory(job).lease_file, time.time())
                self.store.note(lease, f"Supervisor restarted: trainer {trainer.pid} is still running and was adopted")

    def step(self) -> None:
        """One round over all that is running and all that waits.

        A database or disk that does not answer is waited for: the jobs' leases run out before anything is lost.
        """
        for run in list(self.runs.values()):
            try:
                self._attend(run)
            except LeaseLost as lost:
                log.warning("lease lost, trainer ended", job=run.job.id, reason=str(lost))
                run.trainer.kill()
                del self.runs[run.job.id]
            except UnreadableRun as error:
                self._give_up(run, error)
            except (OSError, SQLAlchemyError) as error:
                log.error("will try again", job=run.job.id, error=str(error))
        try:
            self._reclaim_stale()
            while not self.draining and self._claim_next():
                pass
        except LeaseLost as lost:
            # Claimed and lost before the trainer ran: the job is stale and will be taken over as such.
            log.warning("lease lost", reason=str(lost))
        except SQLAlchemyError as error:
            log.error("the database does not answer", error=str(error))
        if not self.draining and all(run.trains for run in self.runs.values()):
            # Imports take seconds of CPU, so not while a job is at that itself.
            self.spares.replenish(len(self._free_devices()) + 1)

    def drain(self) -> None:
        """Claim nothing more; ask every trainer to checkpoint and end. ``step`` sees it through."""
        self.draining = True
        self.spares.close()
        for run in self.runs.values():
            if run.stop is None:
                self._ask_to_stop(run, "drain")

    # ---------------------------------------------------------------- running

    def _attend(self, run: Run) -> None:
        exit = run.trainer.poll()  # before the events, so that those of a dead trainer are all read
        self._renew(run)
        self._carry_events(run)
        trainer_log.rotate(run.directory.log_file, self.settings.max_log_bytes)
        if exit is not None:
            self._conclude(run, exit)
            return
        reason = self._reason_to_stop(run)
        if reason is not None:
            self._ask_to_stop(run, reason)
        if run.kill_at is not None and time.monotonic() >= run.kill_at:
            grace = self.settings.grace_seconds
            self.store.note(run.lease, f"The trainer did not end within {grace:g} s and was killed", level="warn")
            run.trainer.kill()
            run.kill_at = None

    def _renew(self, run: Run) -> None:
        """Every round asks what is wanted; every heartbeat renews the lease, the trainer's after the store's."""
        now = time.monotonic()
        if now - run.renewed >= self.settings.heartbeat_seconds:
            touched = time.time()
            run.wanted = self.store.heartbeat(run.lease, lease_seconds=self.settings.lease_seconds)
            trainer_lease.renew(run.directory.lease_file, touched)
            run.renewed = now
        else:
            wanted = self.store.wanted([run.lease])
            if run.job.id not in wanted:
                raise LeaseLost(f"lease {run.lease.token} on {run.job.id} is over")
            run.wanted = wanted[run.job.id]

    def _carry_events(self, run: Run) -> None:
        while True:
            events, offset = read_events(run.directory.events_file, run.offset)
            if not events:
                return
            self.store.record(run.lease, events, offset=offset)
            run.trains = run.trains or any(event.type in ("progress", "metrics") for event in events)
            run.offset = offset
            run.last_event = time.monotonic()
            run.idle_reported = False

    def _reason_to_stop(self, run: Run) -> StopReason | None:
        if run.wanted == "cancel":
            return "cancel"
        if run.wanted == "pause":
            return "pause"
        now = time.monotonic()
        limit = self._run_time_limit(run.job)
        if limit is not None and run.ran_before + now - run.started > limit:
            return "run_time"
        idle = now - run.last_event
        if self.settings.idle_stop_seconds is not None and idle > self.settings.idle_stop_seconds:
            return "idle"
        if idle > self.settings.idle_warn_seconds and not run.idle_reported:
            run.idle_reported = True
            self.store.note(run.lease, f"No progress from the trainer for {idle:.0f} s", level="warn")
        return None

    def _run_time_limit(self, job: Job) -> float | None:
        limits = [self.settings.max_run_seconds, job.spec.options.max_run_seconds]
        return min((limit for limit in limits if limit is not None), default=None)

    def _ask_to_stop(self, run: Run, reason: StopReason) -> None:
        """The first reason sends the signal; a cancel that comes later only changes what the end will mean."""
        if run.stop is None:
            run.trainer.terminate()
            run.kill_at = time.monotonic() + self.settings.grace_seconds
        if run.stop is None or reason == "cancel":
            run.stop = reason

    def _conclude(self, run: Run, exit: Exit) -> None:
        run.trainer.kill()  # whatever it left behind in its process group
        stop = self._reason_to_stop(run) if run.wanted is not None else run.stop
        verdict = judge(
            attempt=run.job.attempt,
            failures=self.store.failures(run.job.id),
            exit=exit,
            stop=stop,
            outcome=run.directory.read_outcome(run.job.attempt),
            log_tail=run.directory.log_tail(),
            max_attempts=self.settings.max_attempts,
            backoff_seconds=self.settings.retry_backoff_seconds,
            max_run_seconds=self._run_time_limit(run.job),
        )
        if verdict.to is JobStatus.SUCCEEDED and not self._published(run):
            return
        self.store.finish(
            run.lease,
            verdict.to,
            verdict.message,
            error=verdict.error,
            exit_code=exit.code,
            signal=exit.signal,
            retry_after=verdict.retry_after,
            infrastructure=verdict.infrastructure,
        )
        del self.runs[run.job.id]
        log.info("attempt ended", job=run.job.id, attempt=run.job.attempt, to=verdict.to.value, reason=verdict.message)

    def _published(self, run: Run) -> bool:
        """Whether the job's metrics are files, which a job that has succeeded always has.

        Where the disk does not take them, the job's events say so once, and it is tried again every heartbeat.
        """
        if time.monotonic() < run.publish_at:
            return False
        try:
            result_files.publish(self.store, FileStorage(self.settings.files_path, sys.maxsize), run.job.id)
        except OSError as error:
            log.error("result files not stored", job=run.job.id, error=str(error))
            if run.publish_at == 0.0:
                self.store.note(
                    run.lease,
                    f"Training has finished, but the result files cannot be stored ({error.strerror}): free space "
                    "under TRL_HOME on the service. It is tried again until then.",
                    level="warn",
                )
            run.publish_at = time.monotonic() + self.settings.heartbeat_seconds
            return False
        return True

    def _give_up(self, run: Run, error: UnreadableRun) -> None:
        """What the run directory says cannot be read, so nothing that it may still hold can be relied on."""
        run.trainer.kill()
        failed = JobError(code=error.code, message=error.message)
        self.store.finish(run.lease, JobStatus.FAILED, error.message, error=failed)
        del self.runs[run.job.id]
        log.error("run given up", job=run.job.id, reason=error.message)

    # --------------------------------------------------------------- claiming

    def _claim_next(self) -> bool:
        free = self._free_devices()
        if not free:
            return False
        job = self.store.claim(
            self.owner, host=self.host, free_devices=len(free), lease_seconds=self.settings.lease_seconds
        )
        if job is None:
            return False
        lease = Lease(job_id=job.id, token=job.lease_token)
        try:
            disk = disk_need(job.spec, self.settings.runs_path)
        except InvalidRequest as error:
            failed = JobError(code=error.code, message=error.message, param=error.param)
            self.store.finish(lease, JobStatus.FAILED, error.message, error=failed)
            return True
        if not disk.fits:
            self.store.finish(lease, JobStatus.PAUSED, f"Paused: the job {disk.describe()}. Free some, then resume.")
            return True
        devices = tuple(free[: job.devices])
        directory = self._directory(job)
        try:
            directory.write_spec(self._permitted(job.spec))
            trainer_lease.grant(directory.lease_file, self.settings.lease_seconds)
            trainer = self._launch(job, lease, directory, devices)
        except OSError as error:
            # The run directory cannot be written or no process be started: this host's trouble, not the job's.
            log.error("launch failed", job=job.id, error=str(error))
            self._conclude_unlaunched(job, lease, error)
            return True
        self._hold(job, lease, trainer, self.store.list_attempts(job.id)[-1])
        spare = isinstance(trainer, SpareTrainer)
        log.info("trainer started", job=job.id, attempt=job.attempt, pid=trainer.pid, devices=devices, spare=spare)
        return True

    def _launch(self, job: Job, lease: Lease, run: RunDirectory, devices: tuple[str, ...]) -> Trainer:
        """A trainer at work on the job: a spare one if there is one that takes it, else a new process.

        Either is recorded before it is told to start. Raises LeaseLost, OSError.
        """
        environment = self._environment(devices)
        # Of a job on several devices the trainer's process only starts others, and needs no imports.
        if job.spec.ranks == 1 and (spare := self.spares.pop()) is not None:
            orders = Orders(run_directory=run.path, attempt=job.attempt, environment=environment)
            self._record(lease, spare, devices)
            # The leases of other jobs wait meanwhile.
            if spare.take(orders, within=min(5.0, self.settings.lease_seconds / 6)):
                return spare
            log.warning("spare trainer did not take its job, another is started", job=job.id, pid=spare.pid)
        command = shlex.split(self.settings.trainer_command or "")
        launched = LaunchedTrainer(run, command=command, attempt=job.attempt, environment=environment)
        self._record(lease, launched, devices)
        launched.go()
        return launched

    def _record(self, lease: Lease, trainer: Trainer, devices: tuple[str, ...]) -> None:
        try:
            self.store.launched(lease, pid=trainer.pid, pid_created_at=trainer.created_at, devices=devices)
        except BaseException:
            trainer.kill()  # unrecorded, so nobody could ever find it again
            raise

    def _conclude_unlaunched(self, job: Job, lease: Lease, error: OSError) -> None:
        verdict = judge(
            attempt=job.attempt,
            failures=self.store.failures(job.id),
            exit=Exit(),
            stop=None,
            outcome=None,
            log_tail=[f"The trainer could not be started: {error}"],
            max_attempts=self.settings.max_attempts,
            backoff_seconds=self.settings.retry_backoff_seconds,
        )
        self.store.finish(
            lease,
            verdict.to,
            f"{verdict.message} (it could not be started: {error})",
            error=verdict.error,
            retry_after=verdict.retry_after,
            infrastructure=True,
        )

    def _reclaim_stale(self) -> None:
        """Jobs of supervisors that stopped renewing their leases, on this host or another.

        Their trainers have ended by themselves before the lease did (``training.lease``).
        """
        for job, attempt in self.store.running(stale_at=time.time()):
            if job.id in self.runs:
                continue
            lease = self.store.adopt(
                job.id, self.owner, lease_seconds=self.settings.lease_seconds, from_token=job.lease_token
            )
            if lease is None:
                continue
            log.warning("stale lease taken over", job=job.id, host=attempt.host)
            self.store.note(lease, f"The supervisor on {attempt.host} was lost; its lease has run out", level="warn")
            self._hold(job, lease, NO_TRAINER, attempt)

    def _hold(self, job: Job, lease: Lease, trainer: Trainer, attempt: Attempt) -> None:
        now = time.monotonic()
        earlier = [a for a in self.store.list_attempts(job.id) if a.number < attempt.number]
        self.runs[job.id] = Run(
            job=job,
            lease=lease,
            directory=self._directory(job),
            trainer=trainer,
            devices=tuple(attempt.devices),
            offset=self.store.event_offset(lease),
            ran_before=sum((a.ended_at or a.started_at) - a.started_at for a in earlier),
            started=now - max(0.0, time.time() - attempt.started_at),
            renewed=now,
            last_event=now,
        )

    def _permitted(self, spec: TrainingSpec) -> TrainingSpec:
        """The spec with what the operator permits now, whatever was permitted when the job was submitted."""
        trusted = spec.model in self.settings.trust_remote_code_models
        return spec.model_copy(update={"trust_remote_code": trusted})

    def _directory(self, job: Job) -> RunDirectory:
        return RunDirectory(self.settings.runs_path / job.id)

    def _free_devices(self) -> list[str]:
        taken = {device for run in self.runs.values() for device in run.devices}
        return [device for device in self.devices.ids if device not in taken]

    def _environment(self, devices: Sequence[str]) -> dict[str, str]:
        return trainer_environment(devices, self.devices.kind, self._threads())

    def _threads(self) -> int | None:
        """CPU threads of one trainer, where several share the cores."""
        if self.devices.kind != "cpu" or self.devices.count == 1:
            return None
        return max(1, available_cpus() // self.devices.count)
