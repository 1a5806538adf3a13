"""``POST /v1/fine_tuning/jobs/validate``: what a job would be, before it is paid for."""

import asyncio
import threading
from functools import partial
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from bento_service.api.context import Impl, error_answers
from bento_service.api.dataset_report import DatasetReportBody
from bento_service.api.wire import CreateJob
from bento_service.rehearsal import MemoryNeed, Rehearsal
from bento_service.training.preview import Refusal, Run
from bento_service.training.spec import TrainingSpec, TrlOptions
from bento_service.training.token_statistics import Distribution, TokenStatistics

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

_WATCH_SECONDS = 0.5


class ResolvedSettings(BaseModel):
    """What the job would train with: no "auto" left."""

    method: str
    model: str
    seed: int
    beta: float | None = Field(description="Null for a method without it.")
    batch_size: int
    n_epochs: int
    learning_rate: float = Field(description="Peak learning rate.")
    device: Literal["auto", "cuda", "cpu", "mps"]
    distribution: Literal["ddp", "fsdp", "deepspeed"] | None = Field(
        description="How several devices share the training; null: one process trains."
    )
    options: TrlOptions

    @classmethod
    def of(cls, spec: TrainingSpec) -> "ResolvedSettings":
        return cls(**{name: getattr(spec, name) for name in cls.model_fields})


class TokensBody(BaseModel):
    """Tokens of the rows of one purpose. Sums are those of one pass."""

    rows: int
    tokenized_rows: int = Field(description="Rows that were tokenized.")
    sample: bool = Field(description="Not all rows were tokenized in TRL_VALIDATE_SECONDS: the figures are estimates.")
    left_out: int = Field(
        description="Rows that are not trained on: the prompt alone has max_length tokens or more; in reward jobs, a "
        "reply with its prompt has more."
    )
    cut: int = Field(description="Rows of which a reply is cut at max_length.")
    lengths: dict[str, Distribution] = Field(description="Tokens by column, before anything is cut.")
    longest: int = Field(description="Tokens of the longest sequence, prompt and reply, after cutting.")
    tokens: int = Field(description="Tokens that the model reads, padding not counted: the prompt once a reply.")
    padded_tokens: int = Field(description="The same with the padding of random batches (its expected value).")
    shared_prompt_tokens: int = Field(description="Of `tokens`, those that repeat a pair's prompt.")

    @classmethod
    def of(cls, found: TokenStatistics) -> "TokensBody":
        values = found.model_dump(include=set(cls.model_fields))
        return cls(sample=found.tokenized_rows < found.rows, **values)


class MemoryBody(BaseModel):
    """Estimated bytes on each of the job's devices, by arithmetic; see docs/usage.md for what it was compared with."""

    precision: Literal["bf16", "fp16", "fp32"] = Field(description="Of the forward and backward pass.")
    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int | None = Field(description="Null when the model or the data does not tell.")
    overhead: int = Field(description="The process itself.")
    total: int = Field(
        description="The peak. Without gradient accumulation it is less than the sum, since gradients grow as "
        "activations are freed."
    )
    device: int | None = Field(description="Memory of the device; of CPU slots, their share. Null: it cannot be told.")
    fits: bool | None

    @classmethod
    def of(cls, need: MemoryNeed) -> "MemoryBody":
        parts = ("weights", "reference", "gradients", "optimizer", "activations", "overhead", "total")
        return cls(
            precision=need.precision,
            device=need.capacity,
            fits=need.fits,
            **{part: getattr(need.estimate, part) for part in parts},
        )


class DiskBody(BaseModel):
    """Estimated bytes of the job's checkpoints and files, where run directories lie."""

    needed: int
    free: int
    fits: bool


class ValidationObject(BaseModel):
    """What became of a request that was gone through."""

    object: Literal["fine_tuning.job.validation"] = "fine_tuning.job.validation"
    valid: bool = Field(description="Whether submitting the request makes a job whose data can be trained on.")
    errors: list[Refusal] = Field(description="All that stands in the way; empty when valid.")
    training_file: DatasetReportBody | None = Field(description="Null when the model or a file is not there.")
    validation_file: DatasetReportBody | None
    resolved: ResolvedSettings | None
    run: Run | None = Field(description="Null when the data cannot be trained on.")
    training_tokens: TokensBody | None
    validation_tokens: TokensBody | None = Field(description="Of the validation file, or of the rows held out.")
    memory: MemoryBody | None = Field(description="Null when the model is not on the service's host.")
    disk: DiskBody | None

    @classmethod
    def of(cls, rehearsal: Rehearsal) -> "ValidationObject":
        preview, disk = rehearsal.preview, rehearsal.disk

        def report(values: dict[str, Any] | None) -> DatasetReportBody | None:
            return None if values is None else DatasetReportBody.model_validate(values)

        def tokens(found: TokenStatistics | None) -> TokensBody | None:
            return None if found is None else TokensBody.of(found)

        return cls(
            valid=rehearsal.valid,
            errors=list(rehearsal.refusals),
            training_file=None if preview is None else report(preview.training),
            validation_file=None if preview is None else report(preview.validation),
            resolved=None if rehearsal.spec is None else ResolvedSettings.of(rehearsal.spec),
            run=None if preview is None else preview.run,
            training_tokens=None if preview is None else tokens(preview.tokens),
            validation_tokens=None if preview is None else tokens(preview.validation_tokens),
            memory=None if rehearsal.memory is None else MemoryBody.of(rehearsal.memory),
            disk=None if disk is None else DiskBody(needed=disk.needed, free=disk.free, fits=disk.fits),
        )


@router.post("/validate", summary="Validate a job without submitting it", responses=error_answers(400, 408, 413, 503))
async def validate_job(request: Request, body: CreateJob, impl: Impl) -> ValidationObject:
    """Check everything that submitting checks, count the tokens, and estimate memory and disk. Nothing is stored.

    What submitting would refuse is listed in `errors`, all of it, with the status 200. The data is tokenized as the
    trainer will do it, for at most TRL_VALIDATE_SECONDS. At most TRL_MAX_VALIDATIONS run at once: others get 503.
    """
    cancelled = threading.Event()

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_WATCH_SECONDS)
        cancelled.set()

    watcher = asyncio.create_task(watch())
    try:
        rehearse = partial(impl.rehearse, body.to_request(), cancelled)
        found = await to_thread.run_sync(rehearse, abandon_on_cancel=True)
    finally:
        watcher.cancel()
        cancelled.set()  # when the service stops, nobody waits for the answer
    return ValidationObject.of(found)
