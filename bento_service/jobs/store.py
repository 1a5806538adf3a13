"""The only module that talks to the database: what is committed here is what the service knows.

Callers of the API side may use every method. Methods that take a ``Lease`` are the supervisor's: they write only
while the lease's token is the job's newest, and raise ``LeaseLost`` otherwise, with nothing changed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from bento_service.errors import ClientIdConflict, Conflict, NotFound, TooManyJobs, TransitionRefused
from bento_service.jobs import queries, schema
from bento_service.jobs.database import open_engine, read_connection
from bento_service.jobs.forecast import Occupation, Workload
from bento_service.jobs.job import (
    TRANSITIONS,
    Attempt,
    Checkpoint,
    Job,
    JobError,
    JobEvent,
    JobRequest,
    JobStatus,
    Lease,
    News,
    OpenJobLimits,
    Page,
    StoredFile,
    TrainedModel,
)
from bento_service.jobs.progress import advance
from bento_service.jobs.rows import (
    attempt_from_row,
    checkpoint_from_row,
    event_id,
    file_from_row,
    job_event_from_row,
    job_from_row,
    job_values,
    number_in_id,
)
from bento_service.training.events import TrainerEvent

jobs, events, files, checkpoints, attempts = (
    schema.jobs,
    schema.events,
    schema.files,
    schema.checkpoints,
    schema.attempts,
)

LIVE = [status.value for status in JobStatus if TRANSITIONS[status]]


class LeaseLost(Exception):
    """Another supervisor holds the job now, or it has ended; this write changed nothing."""


class Store:
    """Jobs, their events, checkpoints and attempts, and the uploaded files. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> "Store":
        """Connect, and bring the schema up to date. Raises sqlalchemy.exc.SQLAlchemyError when that fails."""
        return cls(open_engine(url))

    def close(self) -> None:
        self._engine.dispose()

    @property
    def reads_at_once(self) -> bool:
        """Whether a read takes a fraction of a millisecond and never waits: true of a file, not of a server."""
        return self._engine.dialect.name == "sqlite"

    def ping(self) -> None:
        with self._read() as connection:
            connection.execute(sa.select(1))

    # ------------------------------------------------------------------ files

    def add_file(self, file: StoredFile) -> StoredFile:
        with self._write() as connection:
            connection.execute(files.insert().values(**{k: getattr(file, k) for k in file.__dataclass_fields__}))
        return file

    def get_file(self, file_id: str) -> StoredFile:
        with self._read() as connection:
            return file_from_row(_file_row(connection, file_id))

    def list_files(
        self,
        after: str | None = None,
        limit: int = 20,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        sha256: str | None = None,
    ) -> Page[StoredFile]:
        """Newest first, or with ``order`` "asc" oldest first."""
        number = files.c.number
        with self._read() as connection:
            query = sa.select(files).order_by(number.desc() if order == "desc" else number)
            if purpose is not None:
                query = query.where(files.c.purpose == purpose)
            if sha256 is not None:
                query = query.where(files.c.sha256 == sha256)
            if after is not None:
                last = _file_row(connection, after)["number"]
                query = query.where(number < last if order == "desc" else number > last)
            return _page([file_from_row(row) for row in _rows(connection, query.limit(limit + 1))], limit)

    def delete_file(self, file_id: str) -> bool:
        """Forget the file. True when no other file has its bytes. Raises Conflict while a live job needs it."""
        with self._write() as connection:
            row = _file_row(connection, file_id)
            users = sa.select(jobs.c.id).where(
                jobs.c.status.in_(LIVE), sa.or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
            )
            user = connection.execute(users.limit(1)).scalar()
            if user is not None:
                raise Conflict(f"File {file_id} is used by job {user}, which has not ended: cancel the job first.")
            connection.execute(files.delete().where(files.c.id == file_id))
            same = sa.select(files.c.id).where(files.c.sha256 == row["sha256"]).limit(1)
            return connection.execute(same).scalar() is None

    # ------------------------------------------------------------------- jobs

    def create_job(self, job: Job, limits: OpenJobLimits | None = None) -> tuple[Job, bool]:
        """Store a new job; committed when this returns.

        Returns the stored job and whether it was created: a client id that is known returns its job when the
        request is the same. Raises ClientIdConflict when it is another, NotFound when a file has been deleted, and
        TooManyJobs past ``limits``. On PostgreSQL, submits at the same moment may pass these by one each.
        """
        try:
            with self._write() as connection:
                for file_id in filter(None, (job.request.training_file, job.request.validation_file)):
                    _file_row(connection, file_id)
                if existing := _same_client(connection, job.request):
                    return existing, False
                if limits is not None:
                    _require_room(connection, job.submitted_by, limits)
                start = {"status": JobStatus.VALIDATING_FILES.value}
                connection.execute(jobs.insert().values(**job_values(job) | start))
                row = _job_row(connection, job.id)
                _append(connection, row, "state", "Job created", data={"to": JobStatus.VALIDATING_FILES.value})
                if job.status is not JobStatus.VALIDATING_FILES:
                    _move(connection, row, job.status, "Files validated, job queued")
                return _job(connection, job.id), True
        except IntegrityError:
            # Two submits of one client id at once, on a database that lets both in: the other one was first.
            with self._read() as connection:
                if existing := _same_client(connection, job.request):
                    return existing, False
            raise

    def find_submitted(self, request: JobRequest) -> Job | None:
        """The job that this request's client id already has. Raises ClientIdConflict when its request is another."""
        with self._read() as connection:
            return _same_client(connection, request)

    def require_room(self, submitted_by: str | None, limits: OpenJobLimits) -> None:
        """Raises TooManyJobs when ``create_job`` would."""
        with self._read() as connection:
            _require_room(connection, submitted_by, limits)

    def get_job(self, job_id: str) -> Job:
        with self._read() as connection:
            return _job(connection, job_id)

    def list_jobs(
        self,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        client_id: str | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """Newest first; ``metadata`` keeps jobs that have all these pairs, ``without_metadata`` those with none."""
        with self._read() as connection:
            query = sa.select(jobs).order_by(jobs.c.number.desc())
            if after is not None:
                query = query.where(jobs.c.number < _job_row(connection, after)["number"])
            if client_id is not None:
                query = query.where(jobs.c.client_id == client_id)
            if without_metadata:
                query = query.where(sa.cast(jobs.c.metadata, sa.Text) == "{}")
            for key, value in (metadata or {}).items():
                query = query.where(_has_metadata(connection, key, value))
            rows = list(_rows(connection, query.limit(limit + 1)))
            return _page([_job_of(connection, row) for row in rows], limit)

    def count_jobs(self) -> dict[JobStatus, int]:
        """Jobs by state, with a zero for each state that has none."""
        with self._read() as connection:
            query = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
            counts = {status: count for status, count in connection.execute(query)}
        return {status: counts.get(status.value, 0) for status in JobStatus}

    def request_stop(self, job_id: str, wanted: Literal["cancel", "pause"]) -> Job:
        """Cancel or pause. A job that is not running changes at once; of a running one its supervisor is told.

        Asking twice is the same as asking once, and a cancel replaces a pause that is not yet carried out.
        Raises NotFound, and TransitionRefused for a job whose state has no way there.
        """
        target = JobStatus.CANCELLED if wanted == "cancel" else JobStatus.PAUSED
        with self._write() as connection:
            row = _job_row(connection, job_id, lock=True)
            status = JobStatus(row["status"])
            if status is target:
                return _job(connection, job_id)
            if target not in TRANSITIONS[status]:
                raise TransitionRefused(f"Job {job_id} is {status}: it cannot be {target} any more.")
            if status is not JobStatus.RUNNING:
                _move(connection, row, target, f"Job {target} on request")
            elif row["wanted"] != wanted and row["wanted"] != "cancel":
                _update(connection, row, wanted=wanted)
                _append(connection, row, "message", f"{wanted.capitalize()} requested: the trainer is asked to stop")
            return _job(connection, job_id)

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again; it continues from its last checkpoint. Raises NotFound, TransitionRefused."""
        with self._write() as connection:
            row = _job_row(connection, job_id, lock=True)
            status = JobStatus(row["status"])
            if status is JobStatus.QUEUED or (status is JobStatus.RUNNING and row["wanted"] is None):
                return _job(connection, job_id)
            if status is not JobStatus.PAUSED:
                state = "being stopped" if row["wanted"] else str(status)
                raise TransitionRefused(f"Job {job_id} is {state}: only a paused job can be resumed.")
            _move(connection, row, JobStatus.QUEUED, "Job resumed on request, queued")
            return _job(connection, job_id)

    def list_events(
        self, job_id: str, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page[JobEvent]:
        """Raises NotFound for an unknown job, and for an ``after`` that is no event of this job."""
        with self._read() as connection:
            _, newest = _state(connection, job_id)
            query = sa.select(events).where(events.c.job_id == job_id)
            if after is not None:
                seq = _seq_of(job_id, after, newest)
                query = query.where(events.c.seq > seq if order == "asc" else events.c.seq < seq)
            query = query.order_by(events.c.seq if order == "asc" else events.c.seq.desc())
            return _page([job_event_from_row(row) for row in _rows(connection, query.limit(limit + 1))], limit)

    def event_seq(self, job_id: str, identifier: str | None) -> int:
        """The number of an event of this job; 0 for None. Raises NotFound."""
        with self._read() as connection:
            _, newest = _state(connection, job_id)
            return 0 if identifier is None else _seq_of(job_id, identifier, newest)

    def news(self, job_id: str, *, after_seq: int, limit: int) -> News:
        """The next events of a job. Cheap when there are none. Raises NotFound for an unknown job."""
        with self._read() as connection:
            status, newest = _state(connection, job_id)
            found: list[JobEvent] = []
            if newest > after_seq:
                rows = connection.execute(queries.EVENTS_AFTER, {"job_id": job_id, "seq": after_seq, "limit": limit})
                found = [job_event_from_row(dict(row)) for row in rows.mappings()]
        has_more = newest > (found[-1].seq if found else after_seq)
        return News(events=found, has_more=has_more, ended=status.is_terminal and not has_more)

    def workload(self, recent: int = 20) -> Workload:
        """What runs now, and how long those of the ``recent`` last ended jobs that succeeded have run."""
        with self._read() as connection:
            return Workload(
                running=[
                    Occupation(
                        devices=row.devices,
                        started_at=row.started_at,
                        estimated_finish=row.progress.get("estimated_finish"),
                    )
                    for row in connection.execute(queries.RUNNING)
                ],
                recent_seconds=[
                    row.finished_at - row.started_at
                    for row in connection.execute(queries.LAST_ENDED, {"limit": recent})
                    if row.status == JobStatus.SUCCEEDED.value
                ],
            )

    def list_checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """Newest first."""
        with self._read() as connection:
            _job_row(connection, job_id)
            query = sa.select(checkpoints).where(checkpoints.c.job_id == job_id)
            if after is not None:
                step = number_in_id(after)
                if step is None:
                    raise NotFound(f"No checkpoint {after} in job {job_id}.", param="after")
                query = query.where(checkpoints.c.step < step)
            query = query.order_by(checkpoints.c.step.desc()).limit(limit + 1)
            return _page([checkpoint_from_row(row) for row in _rows(connection, query)], limit)

    def trained_models(self, job_id: str | None = None) -> list[TrainedModel]:
        """What succeeded jobs (or this one) have made and is still there, newest first."""
        with self._read() as connection:
            query = (
                sa.select(jobs.c.id, jobs.c.fine_tuned_model, jobs.c.request, jobs.c.finished_at)
                .join(checkpoints, sa.and_(checkpoints.c.job_id == jobs.c.id, checkpoints.c.final))
                .where(jobs.c.status == JobStatus.SUCCEEDED.value, jobs.c.fine_tuned_model.is_not(None))
                .order_by(jobs.c.number.desc())
            )
            if job_id is not None:
                query = query.where(jobs.c.id == job_id)
            return [
                TrainedModel(
                    name=row["fine_tuned_model"],
                    base_model=row["request"]["model"],
                    method=row["request"]["method"],
                    job_id=row["id"],
                    finished_at=row["finished_at"],
                )
                for row in _rows(connection, query)
            ]

    def list_attempts(self, job_id: str) -> list[Attempt]:
        """Oldest first."""
        with self._read() as connection:
            query = sa.select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
            return [attempt_from_row(row) for row in _rows(connection, query)]

    # ------------------------------------------------------------- supervisor

    def claim(self, owner: str, *, host: str, free_devices: int, lease_seconds: float) -> Job | None:
        """Take the queue's head if it fits into the free devices; a job that waits out its back-off is passed by.

        The order is strict: a large job at the head is waited for, not overtaken, so that it is not starved.
        """
        now = time.time()
        with self._write() as connection:
            query = (
                sa.select(jobs)
                .where(jobs.c.status == JobStatus.QUEUED.value, jobs.c.not_before <= now)
                .order_by(jobs.c.priority.desc(), jobs.c.number)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = next(_rows(connection, query), None)
            if row is None or row["devices"] > free_devices:
                return None
            number = row["attempt"] + 1
            _move(
                connection,
                row,
                JobStatus.RUNNING,
                f"Attempt {number} starts on {host}",
                data={"attempt": number},
                attempt=number,
                started_at=row["started_at"] or now,
                lease_token=row["lease_token"] + 1,
                lease_owner=owner,
                lease_expires_at=now + lease_seconds,
            )
            connection.execute(
                attempts.insert().values(job_id=row["id"], number=number, host=host, devices=[], started_at=now)
            )
            return _job(connection, row["id"])

    def adopt(self, job_id: str, owner: str, *, lease_seconds: float, from_token: int) -> Lease | None:
        """Take over a running job from the holder of ``from_token``; None when somebody else was faster."""
        with self._write() as connection:
            changed = connection.execute(
                jobs.update()
                .where(
                    jobs.c.id == job_id,
                    jobs.c.status == JobStatus.RUNNING.value,
                    jobs.c.lease_token == from_token,
                )
                .values(lease_token=from_token + 1, lease_owner=owner, lease_expires_at=time.time() + lease_seconds)
            )
            return Lease(job_id=job_id, token=from_token + 1) if changed.rowcount else None

    def running(self, *, host: str | None = None, stale_at: float | None = None) -> list[tuple[Job, Attempt]]:
        """Running jobs with their current attempts: those on one host, or those whose lease ended before a time."""
        with self._read() as connection:
            current = sa.and_(attempts.c.job_id == jobs.c.id, attempts.c.number == jobs.c.attempt)
            query = sa.select(jobs.c.id).join(attempts, current).where(jobs.c.status == JobStatus.RUNNING.value)
            if host is not None:
                query = query.where(attempts.c.host == host)
            if stale_at is not None:
                query = query.where(jobs.c.lease_expires_at < stale_at)
            found = []
            for job_id in connection.execute(query).scalars().all():
                job = _job(connection, job_id)
                attempt = _rows(
                    connection,
                    sa.select(attempts).where(attempts.c.job_id == job_id, attempts.c.number == job.attempt),
                )
                found.append((job, attempt_from_row(next(attempt))))
            return found

    def heartbeat(self, lease: Lease, *, lease_seconds: float) -> Literal["cancel", "pause"] | None:
        """Renew a lease; returns what is wanted of the job. Raises LeaseLost."""
        with self._leased(lease) as (connection, row):
            _update(connection, row, lease_expires_at=time.time() + lease_seconds)
            wanted: Literal["cancel", "pause"] | None = row["wanted"]
            return wanted

    def wanted(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        """What is wanted of each of these running jobs; jobs whose lease is lost are absent."""
        tokens = {lease.job_id: lease.token for lease in leases}
        with self._read() as connection:
            query = sa.select(jobs.c.id, jobs.c.lease_token, jobs.c.wanted).where(
                jobs.c.id.in_(tokens), jobs.c.status == JobStatus.RUNNING.value
            )
            return {row.id: row.wanted for row in connection.execute(query) if row.lease_token == tokens[row.id]}

    def launched(self, lease: Lease, *, pid: int, pid_created_at: float, devices: Sequence[str]) -> None:
        """Record the process of the current attempt. Raises LeaseLost."""
        with self._leased(lease) as (connection, row):
            connection.execute(
                attempts.update()
                .where(attempts.c.job_id == row["id"], attempts.c.number == row["attempt"])
                .values(pid=pid, pid_created_at=pid_created_at, devices=list(devices))
            )

    def event_offset(self, lease: Lease) -> int:
        """Bytes of the run's events file that are in the store. Raises LeaseLost."""
        with self._leased(lease) as (_, row):
            return int(row["event_offset"])

    def record(self, lease: Lease, trainer_events: Sequence[TrainerEvent], *, offset: int) -> None:
        """Carry a trainer's events over; ``offset`` is the byte after the last of them in its file.

        Events, progress, checkpoints and the offset change in one transaction, so that no event is lost or
        doubled whatever dies. Raises LeaseLost.
        """
        with self._leased(lease) as (connection, row):
            progress = row["progress"]
            for event in trainer_events:
                _append(connection, row, event.type, event.message, level=event.level, data=event.data, at=event.time)
                progress = advance(progress, event)
                if event.type == "checkpoint":
                    _save_checkpoint(connection, row["id"], event, progress)
                if removed := event.data.get("removed"):
                    gone = sa.and_(checkpoints.c.job_id == row["id"], checkpoints.c.path == removed)
                    connection.execute(checkpoints.delete().where(gone))
            _update(connection, row, progress=progress, event_offset=offset)

    def note(self, lease: Lease, message: str, *, level: Literal["info", "warn", "error"] = "info") -> None:
        """Add the supervisor's own remark to the job's events. Raises LeaseLost."""
        with self._leased(lease) as (connection, row):
            _append(connection, row, "message", message, level=level)

    def finish(
        self,
        lease: Lease,
        to: JobStatus,
        message: str,
        *,
        error: JobError | None = None,
        exit_code: int | None = None,
        signal: int | None = None,
        retry_after: float = 0.0,
        infrastructure: bool = False,
    ) -> Job:
        """End the current attempt and move the job on; the lease ends with it.

        ``retry_after`` (seconds) is the back-off of a job that goes back to the queue; ``infrastructure`` counts
        the attempt against the retry limit. Raises LeaseLost.
        """
        now = time.time()
        with self._leased(lease) as (connection, row):
            connection.execute(
                attempts.update()
                .where(attempts.c.job_id == row["id"], attempts.c.number == row["attempt"])
                .values(ended_at=now, exit_code=exit_code, signal=signal, reason=message)
            )
            _move(
                connection,
                row,
                to,
                message,
                level="error" if to is JobStatus.FAILED else "info",
                error=None if error is None else {"code": error.code, "message": error.message, "param": error.param},
                not_before=now + retry_after if to is JobStatus.QUEUED else 0.0,
                failures=row["failures"] + int(infrastructure),
                lease_token=row["lease_token"] + 1,
                lease_owner=None,
                lease_expires_at=None,
            )
            return _job(connection, row["id"])

    def expire_artifacts(self, *, ended_before: float) -> list[str]:
        """Forget the checkpoints of jobs that ended before a time, with an event each; returns the jobs' ids."""
        with self._write() as connection:
            ended = sa.select(jobs).where(
                jobs.c.status.not_in(LIVE), jobs.c.finished_at < ended_before, jobs.c.artifacts_expired.is_(False)
            )
            rows = list(_rows(connection, ended.with_for_update()))
            for row in rows:
                _forget_artifacts(connection, row, "their retention time is over")
            return [row["id"] for row in rows]

    def delete_model(self, job_id: str) -> None:
        """Forget the checkpoints of a job that has succeeded. Raises NotFound when it has none."""
        with self._write() as connection:
            row = _job_row(connection, job_id, lock=True)
            if row["status"] != JobStatus.SUCCEEDED.value or row["artifacts_expired"]:
                raise NotFound(f"Job {job_id} has no trained model.")
            _forget_artifacts(connection, row, "the model was deleted")

    def failures(self, job_id: str) -> int:
        """Attempts of the job that ended by an infrastructure cause."""
        with self._read() as connection:
            return int(_job_row(connection, job_id)["failures"])

    # ---------------------------------------------------------------- private

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with read_connection(self._engine) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _leased(self, lease: Lease) -> Iterator[tuple[Connection, dict[str, Any]]]:
        with self._write() as connection:
            row = _job_row(connection, lease.job_id, lock=True)
            if row["status"] != JobStatus.RUNNING.value or row["lease_token"] != lease.token:
                raise LeaseLost(f"lease {lease.token} on {lease.job_id} is over: {row['status']}")
            yield connection, row


def _rows(connection: Connection, query: sa.Select[Any]) -> Iterator[dict[str, Any]]:
    for row in connection.execute(query).mappings():
        yield dict(row)


def _file_row(connection: Connection, file_id: str) -> dict[str, Any]:
    row = next(_rows(connection, sa.select(files).where(files.c.id == file_id)), None)
    if row is None:
        raise NotFound(f"No file {file_id}: it was never uploaded here, or it has been deleted.")
    return row


def _job_row(connection: Connection, job_id: str, *, lock: bool = False) -> dict[str, Any]:
    query = queries.JOB.with_for_update() if lock else queries.JOB
    row = connection.execute(query, {"job_id": job_id}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"No fine-tuning job {job_id}.")
    return dict(row)


def _forget_artifacts(connection: Connection, row: dict[str, Any], why: str) -> None:
    connection.execute(checkpoints.delete().where(checkpoints.c.job_id == row["id"]))
    _append(connection, row, "message", f"Checkpoints and log deleted: {why}")
    _update(connection, row, artifacts_expired=True)


def _state(connection: Connection, job_id: str) -> tuple[JobStatus, int]:
    """Status and newest event number, without reading the rest of the job."""
    row = connection.execute(queries.STATE, {"job_id": job_id}).one_or_none()
    if row is None:
        raise NotFound(f"No fine-tuning job {job_id}.")
    return JobStatus(row.status), row.event_seq


def _seq_of(job_id: str, after: str, newest: int) -> int:
    seq = number_in_id(after)
    if seq is None or after != event_id(job_id, seq) or not 1 <= seq <= newest:
        raise NotFound(f"No event {after} in job {job_id}.", param="after")
    return seq


def _require_room(connection: Connection, submitted_by: str | None, limits: OpenJobLimits) -> None:
    # "is not distinct from": callers without a key are counted together.
    mine = sa.func.count().filter(jobs.c.submitted_by.is_not_distinct_from(submitted_by))
    query = sa.select(sa.func.count(), mine).where(jobs.c.status.in_(LIVE))
    everyones, own = connection.execute(query).one()
    advice = "wait until one has ended, or cancel one"
    if own >= limits.per_caller:
        whose = "No API key is set, and callers" if submitted_by is None else f"The API key {submitted_by!r}"
        have = "have" if submitted_by is None else "has"
        raise TooManyJobs(
            f"{whose} {have} {own} jobs that have not ended, and {limits.per_caller} are allowed "
            f"(TRL_MAX_OPEN_JOBS_PER_KEY on the service): {advice}."
        )
    if everyones >= limits.total:
        raise TooManyJobs(
            f"The service has {everyones} jobs that have not ended, and {limits.total} are allowed "
            f"(TRL_MAX_OPEN_JOBS on the service): {advice}."
        )


def _job(connection: Connection, job_id: str) -> Job:
    return _job_of(connection, _job_row(connection, job_id))


def _job_of(connection: Connection, row: Mapping[str, Any]) -> Job:
    """The job with its place in the queue, if it waits."""
    job = job_from_row(row)
    if job.status is not JobStatus.QUEUED:
        return job
    jobs_ahead, devices_ahead = _ahead(connection, row)
    return replace(job, queue_position=1 + jobs_ahead, devices_ahead=devices_ahead)


def _same_client(connection: Connection, request: JobRequest) -> Job | None:
    client_id = request.options.client_id
    if client_id is None:
        return None
    row = next(_rows(connection, sa.select(jobs).where(jobs.c.client_id == client_id)), None)
    if row is None:
        return None
    if row["digest"] != request.digest:
        raise ClientIdConflict(
            f"Client id {client_id!r} belongs to job {row['id']}, which was submitted with another body. "
            "Use a new id for a new job.",
            param="trl.client_id",
        )
    return _job_of(connection, row)


def _ahead(connection: Connection, row: Mapping[str, Any]) -> tuple[int, int]:
    """Jobs before this one in the queue, and the devices they ask for."""
    found = connection.execute(queries.AHEAD, {"priority": row["priority"], "number": row["number"]}).all()
    return sum(row[0] for row in found), sum(int(row[1]) for row in found)


def _update(connection: Connection, row: dict[str, Any], **values: Any) -> None:
    connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(**values))
    row.update(values)


def _append(
    connection: Connection,
    row: dict[str, Any],
    type: str,
    message: str,
    *,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
    at: float | None = None,
) -> None:
    """Add an event and give it the job's next number. The caller holds the job's row."""
    seq = row["event_seq"] + 1
    values = {"type": type, "level": level, "message": message, "data": dict(data or {})}
    connection.execute(events.insert().values(job_id=row["id"], seq=seq, created_at=at or time.time(), **values))
    _update(connection, row, event_seq=seq)


def _move(
    connection: Connection,
    row: dict[str, Any],
    to: JobStatus,
    message: str,
    *,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> None:
    """The only way a job's state changes: checked against the table, with its event."""
    status = JobStatus(row["status"])
    if to not in TRANSITIONS[status]:
        raise TransitionRefused(f"Job {row['id']} is {status}: it cannot become {to}.")
    now = time.time()
    if to is JobStatus.QUEUED:
        values["queued_at"] = now
    if to.is_terminal:
        values["finished_at"] = now
    if to is not JobStatus.RUNNING:
        values["wanted"] = None
    _append(
        connection, row, "state", message, level=level, data={"from": status.value, "to": to.value, **(data or {})}
    )
    _update(connection, row, status=to.value, **values)


def _save_checkpoint(connection: Connection, job_id: str, event: TrainerEvent, progress: Mapping[str, Any]) -> None:
    """A resumed attempt may save a step again: the newer one replaces the older."""
    step = int(event.data["step"])
    connection.execute(checkpoints.delete().where(checkpoints.c.job_id == job_id, checkpoints.c.step == step))
    connection.execute(
        checkpoints.insert().values(
            job_id=job_id,
            step=step,
            epoch=event.data["epoch"],
            created_at=event.time,
            path=event.data["path"],
            bytes=event.data["bytes"],
            final=event.data["final"],
            metrics=progress.get("metrics", {}) | progress.get("evaluation", {}),
        )
    )


def _has_metadata(connection: Connection, key: str, value: str) -> sa.ColumnElement[bool]:
    # Not by a JSON path, which SQLite has no way to write for every key.
    pairs_of = sa.func.json_each if connection.dialect.name == "sqlite" else sa.func.json_each_text
    pairs = pairs_of(jobs.c.metadata).table_valued("key", "value")
    return sa.exists(sa.select(sa.literal(1)).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))


def _page[T](found: list[T], limit: int) -> Page[T]:
    return Page(data=found[:limit], has_more=len(found) > limit)
