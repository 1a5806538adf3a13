"""TrlRemoteAdapter: Llama Stack's PostTraining protocol on top of the training service.

It keeps no state: a job is found at the service by its client id, which is Llama Stack's job_uuid.
"""

import asyncio
import logging
import re
from contextlib import AsyncExitStack
from typing import Any

import httpx

from . import compat
from .client import TrainingServiceClient
from .config import TrlRemoteConfig
from .errors import AdapterError, Conflict, NotFound, NotSupported, RequestRefused, ServiceUnavailable
from .request import FINGERPRINT, JobPlan, plan_dpo
from .rows import DatasetFile, local_jsonl, spooled
from .service import Job
from .status import checkpoint_of, job_status

logger = logging.getLogger(__name__)

SERVICE_JOB_ID = re.compile(r"ftjob-[A-Za-z0-9_-]+")


class TrlRemoteAdapter:
    """Provider ``remote::trl_remote``. ``datasets`` and ``datasetio`` are the stack's implementations of these APIs.

    Methods raise the errors of ``errors``, and the stack's own where a dataset is unknown or not allowed.
    """

    def __init__(
        self,
        config: TrlRemoteConfig,
        *,
        datasets: Any,
        datasetio: Any,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.config = config
        self.client = TrainingServiceClient(config, transport)
        self._datasets = datasets
        self._datasetio = datasetio

    async def initialize(self) -> None:
        """Nothing: the stack starts whether or not the service is up."""

    async def shutdown(self) -> None:
        await self.client.close()

    async def supervised_fine_tune(self, request: compat.SupervisedFineTuneRequest) -> compat.PostTrainingJob:
        raise NotSupported(
            "remote::trl_remote trains by preference-optimize (DPO); supervised fine-tuning comes with a later release"
        )

    async def preference_optimize(self, request: compat.PreferenceOptimizeRequest) -> compat.PostTrainingJob:
        """Submit a DPO job. The same request under the same job_uuid is the same job, another one a conflict."""
        plan = plan_dpo(request, self.config)
        limit = self.config.timeouts.submit_seconds
        try:
            async with asyncio.timeout(limit):
                job = await self._submit(plan)
        except TimeoutError as error:
            raise ServiceUnavailable(
                f"Submitting job '{plan.job_uuid}' to the training service at {self.client.base_url} took longer than "
                f"{limit:g} s: repeat the same request (that never makes a second job), or raise the provider's "
                "timeouts.submit_seconds"
            ) from error
        return compat.PostTrainingJob(job_uuid=job.job_uuid)

    async def get_training_jobs(self) -> compat.ListPostTrainingJobsResponse:
        """Every job of the service, newest first, whoever submitted it."""
        jobs = [compat.PostTrainingJob(job_uuid=job.job_uuid) async for job in self.client.jobs()]
        return compat.ListPostTrainingJobsResponse(data=jobs)

    async def get_training_job_status(
        self, request: compat.GetTrainingJobStatusRequest
    ) -> compat.PostTrainingJobStatusResponse:
        job = await self._job(request.job_uuid)
        return job_status(job, await self.client.checkpoints(job.id), self.client.base_url)

    async def cancel_training_job(self, request: compat.CancelTrainingJobRequest) -> None:
        job = await self._job(request.job_uuid)
        await self.client.cancel_job(job.id)

    async def get_training_job_artifacts(
        self, request: compat.GetTrainingJobArtifactsRequest
    ) -> compat.PostTrainingJobArtifactsResponse:
        job = await self._job(request.job_uuid)
        checkpoints = [checkpoint_of(job, checkpoint) for checkpoint in await self.client.checkpoints(job.id)]
        return compat.PostTrainingJobArtifactsResponse(job_uuid=job.job_uuid, checkpoints=checkpoints)

    async def _job(self, job_uuid: str) -> Job:
        """The job with this client id, or with this id of the service's own. Raises NotFound."""
        job = await self.client.find_job(job_uuid) if job_uuid else None
        if job is None and SERVICE_JOB_ID.fullmatch(job_uuid):
            return await self.client.get_job(job_uuid)
        if job is None:
            raise NotFound(
                f"There is no training job '{job_uuid}' at the training service at {self.client.base_url}: "
                "list the jobs to see which there are"
            )
        return job

    async def _submit(self, plan: JobPlan) -> Job:
        """What can be refused is refused first: nothing is read before it, nothing uploaded before the rows."""
        training = await self._dataset(plan.dataset_id)
        validation = await self._dataset(plan.validation_dataset_id) if plan.validation_dataset_id else None
        existing = await self.client.find_job(plan.job_uuid)
        await self._check_device()
        async with AsyncExitStack() as files:
            page_rows = self.config.page_rows
            training_file = await files.enter_async_context(spooled(training, self._datasetio, page_rows))
            validation_file = None
            if validation is not None:
                validation_file = await files.enter_async_context(spooled(validation, self._datasetio, page_rows))
            fingerprint = plan.fingerprint(training_file.sha256, validation_file.sha256 if validation_file else None)
            if existing is not None:
                return self._same_request(plan, fingerprint, existing)
            return await self._create(plan, fingerprint, training_file, validation_file)

    async def _dataset(self, dataset_id: str) -> Any:
        dataset = await compat.get_dataset(self._datasets, dataset_id)
        local_jsonl(dataset)  # refuses a URI that nobody here can read
        return dataset

    async def _check_device(self) -> None:
        wanted = self.config.training_config.device
        if wanted == "auto":
            return
        found = (await self.client.health()).device
        if found != wanted:
            raise RequestRefused(
                f"The provider's training_config.device is {wanted}, but the training service at "
                f"{self.client.base_url} trains on {found or 'an unknown device'}: set the provider's device to auto, "
                "or start the service with another TRL_DEVICE"
            )

    def _same_request(self, plan: JobPlan, fingerprint: str, existing: Job) -> Job:
        if (existing.metadata or {}).get(FINGERPRINT) == fingerprint:
            return existing
        raise Conflict(
            f"job_uuid '{plan.job_uuid}' already belongs to job {existing.id} ({existing.status}) at the training "
            f"service at {self.client.base_url}, and that was another request: use a new job_uuid"
        )

    async def _create(
        self, plan: JobPlan, fingerprint: str, training: DatasetFile, validation: DatasetFile | None
    ) -> Job:
        """Upload and create. The uploads are taken back when no job comes of them."""
        uploaded: list[str] = []
        try:
            for data in (training, validation):
                if data is not None:
                    uploaded.append(await self.client.upload(data.file, f"{data.dataset_id}.jsonl"))
            body = plan.create_body(uploaded[0], uploaded[1] if validation else None, fingerprint)
            return await self.client.create_job(body)
        except Conflict:
            # The same request may have come twice at once, and the other one was first.
            existing = await self.client.find_job(plan.job_uuid)
            await self._discard(uploaded)
            if existing is None:
                raise
            return self._same_request(plan, fingerprint, existing)
        except BaseException:
            # Also when the time is up or the stack stops. If the job was made and only the answer got lost, the
            # service keeps the files, since a job uses them.
            await self._discard(uploaded)
            raise

    async def _discard(self, file_ids: list[str]) -> None:
        for file_id in file_ids:
            try:
                await self.client.delete_file(file_id)
            except AdapterError as error:
                # The caller gets the error that led here; this one is for the operator.
                logger.warning("The file %s stays at the training service: %s", file_id, error)
