"""The HTTP routes of post_training where the stack takes a router: Llama Stack 0.5 and 0.6, 0.7 and OGX.

Job routes answer under both of their spellings: ``post-training/job/status?job_uuid=`` is what llama-stack-client of
0.5 and 0.6 asks for, ``post-training/jobs/{job_uuid}/status`` what the server of 0.6 has of its own.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Request

from .caller import TRACE_HEADERS, traced
from .errors import RequestRefused
from .protocol import (
    JobRequest,
    ListPostTrainingJobsResponse,
    PostTraining,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
)


async def _traced(request: Request) -> AsyncIterator[None]:
    with traced({name: request.headers.get(name) for name in TRACE_HEADERS}):
        yield


def create_router(impl: PostTraining) -> APIRouter:
    router = APIRouter(prefix="/v1alpha/post-training", tags=["Post Training"], dependencies=[Depends(_traced)])

    @router.post("/supervised-fine-tune", summary="Run supervised fine-tuning of a model.")
    async def supervised_fine_tune(request: SupervisedFineTuneRequest) -> PostTrainingJob:
        return await impl.supervised_fine_tune(request)

    @router.post("/preference-optimize", summary="Run preference optimization of a model.")
    async def preference_optimize(request: PreferenceOptimizeRequest) -> PostTrainingJob:
        return await impl.preference_optimize(request)

    @router.get("/jobs", summary="Get all training jobs.")
    async def get_training_jobs() -> ListPostTrainingJobsResponse:
        return await impl.get_training_jobs()

    # A job id may hold slashes: any path.
    @router.get("/jobs/{job_uuid:path}/status", summary="Get the status of a training job.")
    @router.get("/job/status", summary="Get the status of a training job.")
    async def get_training_job_status(job_uuid: str) -> PostTrainingJobStatusResponse:
        return await impl.get_training_job_status(JobRequest(job_uuid=job_uuid))

    @router.get("/jobs/{job_uuid:path}/artifacts", summary="Get the artifacts of a training job.")
    @router.get("/job/artifacts", summary="Get the artifacts of a training job.")
    async def get_training_job_artifacts(job_uuid: str) -> PostTrainingJobArtifactsResponse:
        return await impl.get_training_job_artifacts(JobRequest(job_uuid=job_uuid))

    @router.post("/jobs/{job_uuid:path}/cancel", summary="Cancel a training job.")
    async def cancel_training_job(job_uuid: str) -> None:
        await impl.cancel_training_job(JobRequest(job_uuid=job_uuid))

    @router.post("/job/cancel", summary="Cancel a training job.")
    async def cancel_named_training_job(
        asked: Annotated[str | None, Query(alias="job_uuid")] = None,
        sent: Annotated[JobRequest | None, Body()] = None,
    ) -> None:
        job_uuid = sent.job_uuid if sent is not None else asked
        if job_uuid is None:
            raise RequestRefused('job_uuid is missing: send {"job_uuid": "..."}, or ?job_uuid=...')
        await impl.cancel_training_job(JobRequest(job_uuid=job_uuid))

    return router
