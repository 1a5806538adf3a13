"""What goes over the wire, in the shapes of OpenAI's fine-tuning API, and plain conversions to the domain objects.

Times are whole unix seconds. Everything that OpenAI's API does not have is under one key, ``trl``.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from bento_service.jobs.job import Attempt, Checkpoint, Job, JobEvent, JobRequest, JobStatus, Page, StoredFile
from bento_service.jobs.log_page import LogPage
from bento_service.model_catalog import Model
from bento_service.training.spec import TrlOptions


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


def _auto_or(kind: str, **bounds: float) -> tuple[BeforeValidator, WithJsonSchema]:
    schema = {"anyOf": [{"type": "string", "const": "auto"}, {"type": kind, **bounds}, {"type": "null"}]}
    return BeforeValidator(_auto_is_none), WithJsonSchema(schema)


AutoInteger = Annotated[int | None, *_auto_or("integer", minimum=1)]
AutoNumber = Annotated[float | None, *_auto_or("number", exclusiveMinimum=0)]


class Strict(BaseModel):
    """Base of request bodies: unknown keys are refused, and so are infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------------- requests


class DpoHyperparameters(Strict):
    """Hyperparameters of DPO; "auto", null and absence mean the same."""

    beta: AutoNumber = Field(
        default=None, gt=0, description="Strength of the pull towards the reference model. auto: 0.1."
    )
    batch_size: AutoInteger = Field(default=None, ge=1, description="Pairs per forward pass. auto: 8.")
    learning_rate_multiplier: AutoNumber = Field(
        default=None, gt=0, description="Times the default rate (LoRA 1e-5, full fine-tuning 1e-6). auto: 1."
    )
    n_epochs: AutoInteger = Field(default=None, ge=1, description="Passes over the training data. auto: 1.")


class DpoMethod(Strict):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Strict):
    """How to train. Direct preference optimization is the one method so far."""

    type: Literal["dpo"]
    dpo: DpoMethod = DpoMethod()


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class CreateJob(Strict):
    """A fine-tuning job to be made."""

    model: str = Field(
        min_length=1,
        max_length=256,
        description="Base model: <org>/<name> in the service's models folder, or on the Hugging Face hub.",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    training_file: str = Field(min_length=1, max_length=64, description="Id of an uploaded file of preference pairs.")
    validation_file: str | None = Field(
        default=None, min_length=1, max_length=64, description="Id of a file of pairs that are scored, not trained on."
    )
    method: Method = Method(type="dpo")
    suffix: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        pattern="^[A-Za-z0-9_-]+$",
        description="Becomes part of the trained model's name.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="Seed of weights, order and dropout. Default: 42."
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=16, description="Up to 16 pairs of your own; jobs can be listed by them."
    )
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        default=None, description="For compatibility; there are none here."
    )
    trl: TrlOptions = Field(default=TrlOptions(), description="Everything that OpenAI's API has no place for.")

    def to_request(self) -> JobRequest:
        chosen = self.method.dpo.hyperparameters
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata or {},
            method=self.method.type,
            beta=chosen.beta,
            batch_size=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
            n_epochs=chosen.n_epochs,
            options=self.trl,
        )


# --------------------------------------------------------------------- responses


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: StoredFile) -> "FileObject":
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=int(file.created_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobErrorBody(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class AnsweredHyperparameters(BaseModel):
    """The values that the job trains with: no "auto" left."""

    beta: float
    batch_size: int
    learning_rate_multiplier: float | Literal["auto"]
    n_epochs: int


class AnsweredDpo(BaseModel):
    hyperparameters: AnsweredHyperparameters


class AnsweredMethod(BaseModel):
    type: Literal["dpo"]
    dpo: AnsweredDpo


class SupervisedHyperparameters(BaseModel):
    """OpenAI's older place for hyperparameters; the same values as under ``method``."""

    batch_size: int
    learning_rate_multiplier: float | Literal["auto"]
    n_epochs: int


class ProgressBody(BaseModel):
    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None = Field(description="Optimizer steps in all; null until training starts.")
    epoch: float
    tokens: int = Field(description="Tokens trained so far, padding not counted.")
    metrics: dict[str, float | None] = Field(description="The newest values, under TRL's names.")
    baseline: dict[str, float | None] = Field(description="The evaluation before the first step, if there was one.")
    evaluation: dict[str, float | None] = Field(description="The newest evaluation.")


class Resolved(BaseModel):
    """What the defaults and the host made of the request."""

    learning_rate: float = Field(description="Peak learning rate.")
    model_path: str | None = Field(description="The base model's folder on the service; null: loaded from the hub.")
    device: Literal["auto", "cuda", "cpu", "mps"]


class TrlJob(BaseModel):
    """What OpenAI's job object has no place for."""

    client_id: str | None
    queued_at: int | None
    started_at: int | None = Field(description="When the first attempt was launched.")
    attempt: int = Field(description="Launches so far.")
    queue_position: int | None = Field(description="1 is next; only while queued.")
    estimated_start: int | None = Field(
        description="Only while queued: from what runs now and how long the last jobs ran; null when that is unknown."
    )
    priority: int
    devices: int
    wanted: Literal["cancel", "pause"] | None = Field(description="Asked for, not yet carried out.")
    progress: ProgressBody
    options: TrlOptions
    resolved: Resolved


class JobObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str = Field(description="The base model.")
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = Field(description="Only while running.")
    status: JobStatus
    error: JobErrorBody | None
    fine_tuned_model: str | None = Field(description="Name of the trained model, once the job has succeeded.")
    organization_id: str = ""
    result_files: list[str] = Field(
        description="Ids of files with the job's metrics, as CSV and as JSON Lines, once the job has succeeded."
    )
    trained_tokens: int | None = Field(description="Once the job has succeeded; `trl.progress.tokens` has it before.")
    training_file: str
    validation_file: str | None
    seed: int
    metadata: dict[str, str]
    integrations: None = None
    method: AnsweredMethod
    hyperparameters: SupervisedHyperparameters
    trl: TrlJob

    @classmethod
    def of(cls, job: Job) -> "JobObject":
        multiplier: float | Literal["auto"] = "auto"
        if job.request.learning_rate_multiplier is not None:
            multiplier = job.request.learning_rate_multiplier
        succeeded = job.status is JobStatus.SUCCEEDED
        return cls(
            id=job.id,
            model=job.request.model,
            created_at=int(job.created_at),
            finished_at=_seconds(job.finished_at),
            estimated_finish=job.progress.estimated_finish if job.status is JobStatus.RUNNING else None,
            status=job.status,
            error=None
            if job.error is None
            else JobErrorBody(code=job.error.code, message=job.error.message, param=job.error.param),
            fine_tuned_model=job.fine_tuned_model if succeeded else None,
            result_files=job.result_files,
            trained_tokens=job.progress.tokens if succeeded else None,
            training_file=job.request.training_file,
            validation_file=job.request.validation_file,
            seed=job.spec.seed,
            metadata=job.request.metadata,
            method=AnsweredMethod(
                type=job.request.method,
                dpo=AnsweredDpo(
                    hyperparameters=AnsweredHyperparameters(
                        beta=job.spec.beta,
                        batch_size=job.spec.batch_size,
                        learning_rate_multiplier=multiplier,
                        n_epochs=job.spec.n_epochs,
                    )
                ),
            ),
            hyperparameters=SupervisedHyperparameters(
                batch_size=job.spec.batch_size, learning_rate_multiplier=multiplier, n_epochs=job.spec.n_epochs
            ),
            trl=TrlJob(
                client_id=job.client_id,
                queued_at=_seconds(job.queued_at),
                started_at=_seconds(job.started_at),
                attempt=job.attempt,
                queue_position=job.queue_position,
                estimated_start=job.estimated_start,
                priority=job.priority,
                devices=job.devices,
                wanted=job.wanted,
                progress=ProgressBody(
                    step=job.progress.step,
                    total_steps=job.progress.total_steps,
                    epoch=job.progress.epoch,
                    tokens=job.progress.tokens,
                    metrics=job.progress.metrics,
                    baseline=job.progress.baseline,
                    evaluation=job.progress.evaluation,
                ),
                options=job.request.options,
                resolved=Resolved(
                    learning_rate=job.spec.learning_rate, model_path=job.spec.model_path, device=job.spec.device
                ),
            ),
        )


class EventObject(BaseModel):
    """One entry of a job's history."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] = Field(
        description="The event's values. `type` is one of state, message, progress, metrics, evaluation, checkpoint; "
        "`seq` counts the job's events from 1."
    )

    @classmethod
    def of(cls, event: JobEvent) -> "EventObject":
        return cls(
            id=event.id,
            created_at=int(event.created_at),
            level=event.level,
            message=event.message,
            type="metrics" if event.type in ("metrics", "evaluation") else "message",
            data={**event.data, "type": event.type, "seq": event.seq},
        )


# OpenAI's names for what TRL calls by these; the first one present counts.
_CHECKPOINT_METRICS = {
    "train_loss": ("loss", "train_loss"),
    "train_mean_token_accuracy": ("mean_token_accuracy",),
    "valid_loss": ("eval_loss",),
    "valid_mean_token_accuracy": ("eval_mean_token_accuracy",),
}


class TrlCheckpoint(BaseModel):
    path: str = Field(description="The checkpoint's folder on the service's disk.")
    bytes: int = Field(description="Size of the folder's files.")
    final: bool = Field(description="Whether it holds the model after the last step.")
    epoch: float
    metrics: dict[str, float | None] = Field(description="All values at that step, under TRL's names.")


class CheckpointObject(BaseModel):
    """A complete checkpoint."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None] = Field(
        description="step, and of train_loss, train_mean_token_accuracy, valid_loss and valid_mean_token_accuracy "
        "those that were measured."
    )
    trl: TrlCheckpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint, fine_tuned_model: str) -> "CheckpointObject":
        metrics: dict[str, float | None] = {"step": checkpoint.step}
        for name, sources in _CHECKPOINT_METRICS.items():
            present = [checkpoint.metrics[source] for source in sources if source in checkpoint.metrics]
            if present:
                metrics[name] = present[0]
        return cls(
            id=checkpoint.id,
            created_at=int(checkpoint.created_at),
            fine_tuned_model_checkpoint=f"{fine_tuned_model}:ckpt-step-{checkpoint.step}",
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step,
            metrics=metrics,
            trl=TrlCheckpoint(
                path=checkpoint.path,
                bytes=checkpoint.bytes,
                final=checkpoint.final,
                epoch=checkpoint.epoch,
                metrics=checkpoint.metrics,
            ),
        )


class AttemptObject(BaseModel):
    """One launch of a job's trainer."""

    object: Literal["fine_tuning.job.attempt"] = "fine_tuning.job.attempt"
    number: int = Field(description="From 1.")
    host: str
    devices: list[str] = Field(description="GPU indices or UUIDs; slot numbers on a host without GPUs.")
    pid: int | None = Field(description="Null until the process is up.")
    started_at: int
    ended_at: int | None
    exit_code: int | None = Field(description="Null for a process that a signal ended, or whose end nobody saw.")
    signal: int | None = Field(description="The signal that ended the process.")
    reason: str | None = Field(description="What the end meant for the job.")

    @classmethod
    def of(cls, attempt: Attempt) -> "AttemptObject":
        return cls(
            number=attempt.number,
            host=attempt.host,
            devices=attempt.devices,
            pid=attempt.pid,
            started_at=int(attempt.started_at),
            ended_at=_seconds(attempt.ended_at),
            exit_code=attempt.exit_code,
            signal=attempt.signal,
            reason=attempt.reason,
        )


class LogObject(BaseModel):
    """A piece of the trainer's log: the output of all attempts, rotated by size."""

    object: Literal["fine_tuning.job.log"] = "fine_tuning.job.log"
    offset: int = Field(description="Byte at which the content starts.")
    next_offset: int = Field(description="The `offset` of the next piece.")
    size: int = Field(description="Bytes of the log now.")
    truncated: bool = Field(
        description="The offset asked for was past the end: the log was rotated; this starts at 0."
    )
    content: str = Field(description="Text; bytes that are no UTF-8 are U+FFFD.")

    @classmethod
    def of(cls, page: LogPage) -> "LogObject":
        return cls(
            offset=page.offset,
            next_offset=page.next_offset,
            size=page.size,
            truncated=page.truncated,
            content=page.content,
        )


class TrlModel(BaseModel):
    kind: Literal["base", "trained"]
    base_model: str | None = Field(description="That a trained model was made from.")
    job_id: str | None = Field(description="The job that made a trained model.")


class ModelObject(BaseModel):
    """A model that a job can start from, or that one has made."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = Field(description="Of a base model its organization, of a trained one trl-remote.")
    trl: TrlModel

    @classmethod
    def of(cls, model: Model) -> "ModelObject":
        organization = model.id.partition("/")[0] if "/" in model.id else "local"
        return cls(
            id=model.id,
            created=int(model.created_at),
            owned_by=organization if model.kind == "base" else "trl-remote",
            trl=TrlModel(kind=model.kind, base_model=model.base_model, job_id=model.job_id),
        )


class ModelList(BaseModel):
    """All models; OpenAI's list of models has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ListOf[T: BaseModel](BaseModel):
    """One page of a list. The next one starts with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page_of[D: (StoredFile, Job, JobEvent, Checkpoint), W: BaseModel](page: Page[D], wire: list[W]) -> ListOf[W]:
    """A page of domain objects that were converted to ``wire``."""
    return ListOf(
        data=wire,
        has_more=page.has_more,
        first_id=page.data[0].id if page.data else None,
        last_id=page.data[-1].id if page.data else None,
    )


class Health(BaseModel):
    status: Literal["healthy", "unhealthy"]
    service: Literal["trl-training-service"] = "trl-training-service"
    version: str
    device: Literal["cuda", "cpu", "mps"] = Field(description="Where jobs train.")
    slots: int = Field(description="GPUs, or jobs that train at once on a host without GPUs.")
    queue: dict[JobStatus, int] = Field(description="Jobs by state.")


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
