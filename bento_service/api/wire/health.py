"""The body of ``/health``."""

from typing import Literal

from pydantic import BaseModel, Field

from bento_service.jobs.job import JobStatus


class Health(BaseModel):
    status: Literal["healthy", "unhealthy"]
    service: Literal["trl-training-service"] = "trl-training-service"
    version: str
    device: Literal["cuda", "cpu", "mps"] = Field(description="Where jobs train.")
    slots: int = Field(description="GPUs, or jobs that train at once on a host without GPUs.")
    queue: dict[JobStatus, int] = Field(description="Jobs by state.")
