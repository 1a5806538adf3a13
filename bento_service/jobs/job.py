"""The domain objects: jobs, their life, and what belongs to them. Plain frozen data, no storage, no HTTP."""

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from bento_service.training.spec import MethodName, TrainingSpec, TrlOptions


class JobStatus(StrEnum):
    """Where a job is in its life; the names of OpenAI's fine-tuning API, and ``paused``."""

    VALIDATING_FILES = "validating_files"  # stored, its data is being checked
    QUEUED = "queued"  # waiting for a device
    RUNNING = "running"  # a supervisor holds its lease
    PAUSED = "paused"  # stopped on request, holds no device, continues from its checkpoint
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


# Every change of state there is. Terminal states have none.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What a caller asks for, validated in shape. None in a hyperparameter is OpenAI's "auto"."""

    model: str
    training_file: str  # file id
    validation_file: str | None = None  # file id
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    method: MethodName = "dpo"
    beta: float | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    n_epochs: int | None = None
    options: TrlOptions = field(default_factory=TrlOptions)

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "options"}
        return {**values, "options": self.options.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "JobRequest":
        return cls(**{**values, "options": TrlOptions.model_validate(values["options"])})

    @property
    def digest(self) -> str:
        """SHA-256 of the request in canonical JSON: two requests are the same when their digests are."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a running job is; the newest values only, history is in the events."""

    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    tokens: int = 0  # trained tokens so far, padding not counted
    metrics: dict[str, float | None] = field(default_factory=dict)  # the latest metrics event, under TRL's names
    baseline: dict[str, float | None] = field(default_factory=dict)  # the evaluation before the first step
    evaluation: dict[str, float | None] = field(default_factory=dict)  # the latest evaluation
    best: dict[str, Any] | None = None  # step, metric and value of the best checkpoint (``training.best.Best``)
    estimated_finish: int | None = None  # unix seconds


@dataclass(frozen=True, kw_only=True)
class Job:
    id: str  # "ftjob-" and 24 hex digits, made by the service
    client_id: str | None
    request: JobRequest
    spec: TrainingSpec
    status: JobStatus
    priority: int
    devices: int
    created_at: float  # unix seconds, as all times
    queued_at: float | None = None
    started_at: float | None = None  # the first attempt's launch
    finished_at: float | None = None
    progress: Progress = Progress()
    error: JobError | None = None
    wanted: Literal["cancel", "pause"] | None = None  # asked for, not yet carried out
    attempt: int = 0  # launches so far
    lease_token: int = 0  # grows with every claim; a write with an older token is refused
    submitted_by: str | None = None  # name of the API key that submitted it; None where there are no keys
    fine_tuned_model: str | None = None  # name under which the trained model is known
    queue_position: int | None = None  # 1 is next; only while queued
    devices_ahead: int | None = None  # asked for by the jobs before it; only while queued
    estimated_start: int | None = None  # unix seconds; only while queued, None when nothing is known to tell it by

    @property
    def result_files(self) -> list[str]:
        """Ids of the files that its metrics were stored as, before it became succeeded."""
        if self.status is not JobStatus.SUCCEEDED:
            return []
        return [result_file_id(self.id, form) for form in ("csv", "jsonl")]


def result_file_id(job_id: str, form: str) -> str:
    """Id of a job's metrics as a file: known from the job's, so that a repeated attempt to store it finds it."""
    return f"file-{job_id.removeprefix('ftjob-')}-{form}"


@dataclass(frozen=True, kw_only=True)
class OpenJobLimits:
    """How many jobs may be there that have not ended."""

    total: int
    per_caller: int  # for each API key; callers without one count together


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to write to a running job. A supervisor that lost it holds a token older than the job's."""

    job_id: str
    token: int


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One launch of a job's trainer."""

    job_id: str
    number: int  # from 1
    host: str
    devices: list[str]  # GPU indices or UUIDs; slot numbers on a CPU
    started_at: float
    pid: int | None = None
    pid_created_at: float | None = None  # unix seconds, as the kernel has it
    ended_at: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One entry of a job's history, in the order ``seq`` (from 1, no gaps, per job)."""

    id: str  # "ftevent-<job's hex>-<seq>"
    job_id: str
    seq: int
    created_at: float
    type: str  # state, message, progress, metrics, evaluation, checkpoint
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class News:
    """What a watcher of a job has not seen yet."""

    events: list[JobEvent]  # oldest first
    has_more: bool  # there are more events than these
    ended: bool  # the job has ended, and after these events nothing is to be waited for


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint of a job, on the service's disk."""

    id: str  # "ftckpt-<job's hex>-<step>"
    job_id: str
    step: int
    epoch: float
    created_at: float
    path: str  # absolute folder
    bytes: int
    final: bool  # holds the trained model after the last step
    metrics: dict[str, float | None] = field(default_factory=dict)  # training and eval values at that step


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a succeeded job made, while its final checkpoint is kept."""

    name: str
    base_model: str
    method: MethodName
    job_id: str
    finished_at: float


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """An uploaded data file, or a job's metrics. The bytes lie once per digest, however many files name them."""

    id: str  # "file-" and 24 hex digits; of a job's metrics see ``result_file_id``
    filename: str  # the caller's name: data, never a path
    purpose: str
    bytes: int
    sha256: str
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Page[T]:
    """Some of a list, and whether there is more after it."""

    data: list[T]
    has_more: bool
