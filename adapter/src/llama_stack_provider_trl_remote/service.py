"""The training service's objects, as far as the adapter reads them. Further fields are left alone."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ServiceObject(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ServiceError(ServiceObject):
    """Why a job failed."""

    code: str | None = None
    message: str
    param: str | None = None


class JobExtension(ServiceObject):
    client_id: str | None = None
    started_at: int | None = None  # unix seconds
    attempt: int = 0
    queue_position: int | None = None  # 1 is next
    wanted: str | None = None  # cancel or pause: asked for, not yet carried out
    progress: dict[str, Any] | None = None  # step, total_steps, epoch, tokens, metrics


class Job(ServiceObject):
    id: str
    model: str
    status: str  # validating_files, queued, running, paused, succeeded, failed, cancelled
    created_at: int  # unix seconds, as all times
    finished_at: int | None = None
    estimated_finish: int | None = None
    error: ServiceError | None = None
    fine_tuned_model: str | None = None
    metadata: dict[str, str] | None = None
    method: dict[str, Any] | None = None
    trl: JobExtension

    @property
    def kind(self) -> str:
        """The method's name: dpo, supervised, ..."""
        return str((self.method or {}).get("type", "dpo"))

    @property
    def job_uuid(self) -> str:
        """The job's id at Llama Stack; the service's own for a job that was submitted elsewhere without one."""
        return self.trl.client_id or self.id


class CheckpointExtension(ServiceObject):
    path: str  # on the service's host
    epoch: float
    final: bool = False
    metrics: dict[str, Any] = {}


class Checkpoint(ServiceObject):
    id: str
    created_at: int
    step_number: int
    trl: CheckpointExtension


class JobPage(ServiceObject):
    data: list[Job]
    has_more: bool


class CheckpointPage(ServiceObject):
    data: list[Checkpoint]
    has_more: bool


class FileExtension(ServiceObject):
    sha256: str | None = None


class UploadedFile(ServiceObject):
    id: str
    trl: FileExtension | None = None


class FilePage(ServiceObject):
    data: list[UploadedFile]


class Health(ServiceObject):
    service: str
    device: str | None = None
