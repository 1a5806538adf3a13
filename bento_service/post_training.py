"""The core object: what the service can do, independent of how it is asked. Knows no HTTP and no BentoML."""

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import structlog
from sqlalchemy.exc import SQLAlchemyError

from bento_service.admission import Admission
from bento_service.checkpoint_archive import CheckpointArchive, open_checkpoint
from bento_service.errors import (
    InvalidDataset,
    InvalidRequest,
    NotFound,
    Overloaded,
    UnreadableRun,
)
from bento_service.files import FileStorage, IncomingFile, StoredBytes
from bento_service.jobs.devices import visible_devices
from bento_service.jobs.forecast import estimated_start
from bento_service.jobs.job import (
    Attempt,
    Checkpoint,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    News,
    OpenJobLimits,
    Page,
    StoredFile,
)
from bento_service.jobs.log_page import LogPage, read_page, read_tail
from bento_service.jobs.retention import delete_model
from bento_service.jobs.store import Store
from bento_service.model_catalog import Model, ModelCatalog
from bento_service.plain_file import PlainFile
from bento_service.rehearsal import Rehearsal, Rehearsals
from bento_service.settings import Settings
from bento_service.training import manifest
from bento_service.training.preferences import require_valid
from bento_service.training.run_directory import RunDirectory
from bento_service.training.spec import MethodName
from bento_service.url_import.download import UrlImports

# Who asked for what: the API binds the caller and the request's id to its lines.
log = structlog.get_logger("bento_service.jobs")

PURPOSE = "fine-tune"
MAX_FILENAME = 255


class TrlPostTrainingImpl:
    """Upload data, submit jobs, follow them, stop them, fetch their checkpoints.

    All state is in the store and the file storage, so that several of these may work on the same ones.
    Methods block; they may be called from any thread.
    """

    def __init__(self, settings: Settings, store: Store, files: FileStorage) -> None:
        self.settings = settings
        self.devices = visible_devices(settings)  # where jobs train on this host
        self._store = store
        self._files = files
        self._imports = UrlImports(settings)
        self._admission = Admission(settings, self.devices, lambda file_id: self.file_content(file_id).path)
        self._rehearsals = Rehearsals(settings, self.devices, self._admission)
        self._catalog = ModelCatalog(settings.models_path, store)
        # Between a commit of bytes and their row in the store, nobody may delete these bytes as unused.
        self._files_lock = threading.Lock()

    @property
    def reads_at_once(self) -> bool:
        """Whether ``status``, ``events`` and ``news`` are so quick here that an event loop may call them itself."""
        return self._store.reads_at_once

    # ------------------------------------------------------------------ files

    def receive_file(self) -> IncomingFile:
        """Bytes to write as they arrive; ``add_file`` makes them a file. Use it as a context manager."""
        return self._files.receive()

    def add_file(self, incoming: IncomingFile, *, filename: str, purpose: str = PURPOSE) -> StoredFile:
        """Keep what was received. Raises InvalidRequest for another purpose, InvalidDataset for an empty file."""
        require_purpose(purpose)
        if incoming.bytes == 0:
            raise InvalidDataset(
                f"File {_short(filename)!r} is empty: upload JSON Lines, one preference pair a line.", param="file"
            )
        with self._files_lock:
            return self._register(incoming.commit(), filename, purpose)

    def upload(self, source: BinaryIO, *, filename: str, purpose: str = PURPOSE) -> StoredFile:
        """Store a whole file object. Raises as ``add_file`` does, and TooLarge."""
        with self.receive_file() as incoming:
            while chunk := source.read(1 << 20):
                incoming.write(chunk)
            return self.add_file(incoming, filename=filename, purpose=purpose)

    def import_file(self, url: str, *, filename: str | None = None, purpose: str = PURPOSE) -> StoredFile:
        """A file of what a URL answers. Raises as ``add_file`` and ``UrlImports.download`` do."""
        require_purpose(purpose)
        with self.receive_file() as incoming:
            name = self._imports.download(url, incoming)
            return self.add_file(incoming, filename=filename or name, purpose=purpose)

    def get_file(self, file_id: str) -> StoredFile:
        """Raises NotFound."""
        return self._store.get_file(file_id)

    def list_files(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        sha256: str | None = None,
    ) -> Page[StoredFile]:
        """By age, from the one after ``after``. Raises NotFound for an unknown ``after``."""
        return self._store.list_files(after=after, limit=limit, purpose=purpose, order=order, sha256=sha256)

    def delete_file(self, file_id: str) -> None:
        """Raises NotFound, and Conflict while a job that has not ended uses the file."""
        with self._files_lock:
            sha256 = self._store.get_file(file_id).sha256
            if self._store.delete_file(file_id):
                self._files.delete(sha256)
        log.info("file.deleted", file=file_id)

    def file_content(self, file_id: str) -> PlainFile:
        """The file's bytes, to be read. Raises NotFound."""
        file = self._store.get_file(file_id)
        path = self._files.existing_path(file.sha256)
        return PlainFile(name=file.filename, path=path, size=file.bytes, sha256=file.sha256)

    # ------------------------------------------------------------------- jobs

    def submit(self, request: JobRequest, *, submitted_by: str | None = None) -> Job:
        """Check everything that can be checked now, and queue the job; it is committed when this returns.

        A client id that is known returns its job when the request is the same, before anything else is checked. What
        costs little is checked first (``admission``), the rows of the data last.
        Raises InvalidRequest (a missing file, a contradiction), UnknownModel, InvalidDataset, ResourcesExceeded,
        ClientIdConflict, TooManyJobs. After any of them nothing of the job is stored.
        """
        if existing := self._store.find_submitted(request):
            return self._with_forecast([existing])[0]
        # At once, and again when it is stored: in between, a large file may be checked for minutes.
        limits = OpenJobLimits(total=self.settings.max_open_jobs, per_caller=self.settings.max_open_jobs_per_key)
        self._store.require_room(submitted_by, limits)
        short_id = secrets.token_hex(12)
        spec = self._admission.judge(request, f"ftjob-{short_id}").require()
        self._require_valid(Path(spec.training_file), "training_file", spec.method)
        if spec.validation_file is not None:
            self._require_valid(Path(spec.validation_file), "validation_file", spec.method)
        job = Job(
            id=spec.job_id,
            client_id=request.options.client_id,
            request=request,
            spec=spec,
            status=JobStatus.QUEUED,
            priority=request.options.priority,
            devices=request.options.devices,
            created_at=time.time(),
            submitted_by=submitted_by,
            fine_tuned_model=":".join(filter(None, ("ft", request.model, request.suffix, short_id))),
        )
        stored, created = self._store.create_job(job, limits)
        if created:
            log.info("job.submitted", job=stored.id, model=request.model)
        return self._with_forecast([stored])[0]

    def rehearse(self, request: JobRequest, cancelled: threading.Event) -> Rehearsal:
        """What ``submit`` would say to the request, and what the job would be; nothing is stored.

        Reads and tokenizes the data in a process that ends when ``cancelled`` is set. Raises Overloaded.
        """
        return self._rehearsals.rehearse(request, cancelled)

    def status(self, job_id: str) -> Job:
        """Raises NotFound."""
        return self._with_forecast([self._store.get_job(job_id)])[0]

    def list_jobs(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        client_id: str | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """Newest first; only jobs with all this metadata, or without any. Raises NotFound for an unknown ``after``."""
        page = self._store.list_jobs(
            after=after, limit=limit, metadata=metadata, client_id=client_id, without_metadata=without_metadata
        )
        return replace(page, data=self._with_forecast(page.data))

    def cancel(self, job_id: str) -> Job:
        """Stop the job for good; a running one is told to. Raises NotFound, TransitionRefused once it has ended."""
        job = self._store.request_stop(job_id, "cancel")
        log.info("job.cancel", job=job.id, status=job.status.value)
        return job

    def pause(self, job_id: str) -> Job:
        """Stop the job, to be continued from its checkpoint. Raises NotFound, TransitionRefused."""
        job = self._store.request_stop(job_id, "pause")
        log.info("job.pause", job=job.id, status=job.status.value)
        return job

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again. Raises NotFound, TransitionRefused."""
        return self._with_forecast([self._store.resume(job_id)])[0]

    def events(
        self, job_id: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page[JobEvent]:
        """The job's history from the event after ``after`` on. Raises NotFound."""
        return self._store.list_events(job_id, after=after, limit=limit, order=order)

    def event_seq(self, job_id: str, event_id: str | None) -> int:
        """Where to start watching: an event's number, 0 for None. Raises NotFound."""
        return self._store.event_seq(job_id, event_id)

    def news(self, job_id: str, *, after_seq: int, limit: int = 500) -> News:
        """What happened to the job since event number ``after_seq``; made to be asked often. Raises NotFound."""
        return self._store.news(job_id, after_seq=after_seq, limit=limit)

    def artifacts(self, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """The job's complete checkpoints, newest first. Raises NotFound."""
        return self._store.list_checkpoints(job_id, after=after, limit=limit)

    def checkpoint(self, job_id: str, step: int) -> CheckpointArchive:
        """A checkpoint's published files. Raises NotFound, NotReady while it is written, UnreadableRun."""
        job = self._store.get_job(job_id)
        return open_checkpoint(self._run(job), job.id, step, ended=job.status.is_terminal)

    def manifest(self, job_id: str) -> manifest.RunManifest:
        """What a succeeded job was. Raises NotFound, before it has succeeded and after the retention time."""
        job = self._store.get_job(job_id)
        found = manifest.read(self._run(job)) if job.status is JobStatus.SUCCEEDED else None
        if found is None:
            raise NotFound(
                f"Job {job.id} is {job.status.value} and has no manifest: one is written when a job succeeds, and is "
                "deleted with its checkpoints."
            )
        return found

    def attempts(self, job_id: str) -> list[Attempt]:
        """The launches of the job's trainer, oldest first. Raises NotFound."""
        self._store.event_seq(job_id, None)
        return self._store.list_attempts(job_id)

    def log(self, job_id: str, *, offset: int = 0, tail: int | None = None, limit: int = 65536) -> LogPage:
        """At most ``limit`` bytes of the trainer's log: from ``offset`` on, or the last ``tail`` lines.

        Empty before the first attempt, and after the retention time. Raises NotFound.
        """
        job = self._store.get_job(job_id)
        log_file = self._run(job).log_file
        if tail is not None:
            return read_tail(log_file, lines=tail, limit=limit)
        return read_page(log_file, offset=offset, limit=limit)

    # ----------------------------------------------------------------- models

    def list_models(self) -> list[Model]:
        """Base models in the models folder by name, then trained ones, newest first."""
        return self._catalog.all()

    def get_model(self, name: str) -> Model:
        """Raises NotFound."""
        return self._catalog.get(name)

    def delete_model(self, name: str) -> None:
        """Delete a trained model, with all checkpoints and the log of its job. Raises NotFound, of base models too."""
        model = self._catalog.get(name)
        if model.job_id is None:
            raise NotFound(f"{name} is a base model: only trained models can be deleted.", param="model")
        delete_model(self.settings, self._store, model.job_id)
        log.info("model.deleted", model=name, job=model.job_id)

    # ---------------------------------------------------------------- service

    def count_jobs(self) -> dict[JobStatus, int]:
        """Jobs by state. Raises Overloaded when the store does not answer."""
        try:
            return self._store.count_jobs()
        except SQLAlchemyError as error:
            raise Overloaded(f"The database does not answer ({type(error).__name__}): try again later.") from error

    # ---------------------------------------------------------------- private

    def _run(self, job: Job) -> RunDirectory:
        path = self.settings.runs_path / job.id
        if path.is_symlink():
            raise UnreadableRun(f"The run directory of job {job.id} is a link, and links are not followed")
        return RunDirectory(path)

    def _register(self, stored: StoredBytes, filename: str, purpose: str) -> StoredFile:
        return self._store.add_file(
            StoredFile(
                id=f"file-{secrets.token_hex(12)}",
                filename=_short(filename),
                purpose=purpose,
                bytes=stored.bytes,
                sha256=stored.sha256,
                created_at=time.time(),
            )
        )

    def _with_forecast(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with their estimated start; costs nothing where none of them waits."""
        if not any(job.status is JobStatus.QUEUED for job in jobs):
            return list(jobs)
        workload, now = self._store.workload(), time.time()

        def start(job: Job) -> int | None:
            if job.devices_ahead is None:
                return None
            return estimated_start(
                workload, devices=self.devices.count, wanted=job.devices, ahead=job.devices_ahead, now=now
            )

        return [replace(job, estimated_start=start(job)) for job in jobs]

    def _require_valid(self, data: Path, param: str, method: MethodName) -> None:
        limits = self.settings
        require_valid(data, param, method=method, cap=limits.max_report_rows, bounds=limits.row_bounds)


def require_purpose(purpose: str) -> None:
    """Raises InvalidRequest unless the purpose is the one there is."""
    if purpose != PURPOSE:
        raise InvalidRequest(f"purpose {_short(purpose)!r} is not supported here: use {PURPOSE!r}.", param="purpose")


def _short(name: str) -> str:
    return name if len(name) <= MAX_FILENAME else name[: MAX_FILENAME - 3] + "..."
