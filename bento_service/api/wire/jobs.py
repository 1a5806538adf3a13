"""Fine-tuning jobs: what is asked for, and what is answered."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from bento_service.api.wire.base import NO_NUL, Strict, seconds
from bento_service.api.wire.methods import Method, SupervisedHyperparameters, SupervisedMethod
from bento_service.errors import InvalidRequest
from bento_service.jobs.job import Job, JobRequest, JobStatus
from bento_service.training.best import Best
from bento_service.training.spec import TrlOptions

MetadataKey = Annotated[str, StringConstraints(max_length=64, pattern=NO_NUL)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]


class CreateJob(Strict):
    """A fine-tuning job to be made."""

    model: str = Field(
        min_length=1,
        max_length=256,
        pattern=NO_NUL,
        description="Base model: <org>/<name> in the service's models folder, or on the Hugging Face hub.",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    training_file: str = Field(
        min_length=1, max_length=64, pattern=NO_NUL, description="Id of an uploaded file of rows for the method."
    )
    validation_file: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        pattern=NO_NUL,
        description="Id of a file of rows that are scored, not trained on.",
    )
    method: Method | None = Field(
        default=None, description="Absent: dpo, or supervised when `hyperparameters` are given beside it."
    )
    hyperparameters: SupervisedHyperparameters | None = Field(
        default=None,
        description="OpenAI's older place for those of the method supervised.",
        json_schema_extra={"deprecated": True},
    )
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
        """Raises InvalidRequest when hyperparameters are given in both of their places."""
        method = self._chosen_method()
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata or {},
            method=method.type,
            **method.hyperparameters.chosen(),
            options=self.trl,
        )

    def _chosen_method(self) -> Method:
        if self.hyperparameters is None:
            return self.method or Method(type="dpo")
        if self.method is not None:
            raise InvalidRequest(
                "Both method and hyperparameters are given: the second is the older place for the hyperparameters of "
                f"supervised jobs. Give them as method.{self.method.type}.hyperparameters only.",
                param="hyperparameters",
            )
        return Method(type="supervised", supervised=SupervisedMethod(hyperparameters=self.hyperparameters))


class JobErrorBody(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class ProgressBody(BaseModel):
    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None = Field(description="Optimizer steps in all; null until training starts.")
    epoch: float
    tokens: int = Field(description="Tokens trained so far, padding not counted.")
    metrics: dict[str, float | None] = Field(description="The newest values, under TRL's names.")
    baseline: dict[str, float | None] = Field(description="The evaluation before the first step, if there was one.")
    evaluation: dict[str, float | None] = Field(description="The newest evaluation.")
    best: Best | None = Field(description="The best checkpoint so far, by trl.options.evaluation.metric.")


class Resolved(BaseModel):
    """What the defaults and the host made of the request."""

    learning_rate: float = Field(description="Peak learning rate.")
    model_path: str | None = Field(description="The base model's folder on the service; null: loaded from the hub.")
    device: Literal["auto", "cuda", "cpu", "mps"]
    distribution: Literal["ddp", "fsdp", "deepspeed"] | None = Field(
        description="How several devices share the training; null: one process trains."
    )


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
    submitted_by: str | None = Field(
        description="Name of the API key that submitted the job; null where there are no keys."
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
    method: Method
    hyperparameters: SupervisedHyperparameters = Field(description="OpenAI's older place for the same values.")
    trl: TrlJob

    @classmethod
    def of(cls, job: Job) -> "JobObject":
        hyperparameters = {
            "beta": job.spec.beta,
            "batch_size": job.spec.batch_size,
            "learning_rate_multiplier": job.request.learning_rate_multiplier,
            "n_epochs": job.spec.n_epochs,
        }
        method = Method.of(job.request.method, hyperparameters)
        succeeded = job.status is JobStatus.SUCCEEDED
        return cls(
            id=job.id,
            model=job.request.model,
            created_at=int(job.created_at),
            finished_at=seconds(job.finished_at),
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
            method=method,
            hyperparameters=SupervisedHyperparameters.model_validate(
                {name: hyperparameters[name] for name in SupervisedHyperparameters.model_fields}
            ),
            trl=TrlJob(
                client_id=job.client_id,
                queued_at=seconds(job.queued_at),
                started_at=seconds(job.started_at),
                attempt=job.attempt,
                queue_position=job.queue_position,
                estimated_start=job.estimated_start,
                submitted_by=job.submitted_by,
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
                    best=None if job.progress.best is None else Best.model_validate(job.progress.best),
                ),
                options=job.request.options,
                resolved=Resolved(
                    learning_rate=job.spec.learning_rate,
                    model_path=job.spec.model_path,
                    device=job.spec.device,
                    distribution=job.spec.distribution,
                ),
            ),
        )
