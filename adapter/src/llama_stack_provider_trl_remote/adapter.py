"""TrlRemoteAdapter: Llama Stack's PostTraining protocol on top of the training service.

It keeps no state: a job is found at the service by its client id, which is Llama Stack's job_uuid.
"""

import asyncio
import logging
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from . import compat
from .client import TrainingServiceClient
from .config import TrlRemoteConfig
from .errors import AdapterError, Conflict, NotFound, RequestRefused, ServiceUnavailable
from .protocol import (
    JobRequest,
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
)
from .request import FINGERPRINT, JobPlan, plan_dpo, plan_sft
from .rows import DatasetFile, spooled
from .service import Job
from .sources import Remote, ServiceFile, Source, Table, refused, source_of
from .status import checkpoint_of, job_status

logger = logging.getLogger(__name__)

SERVICE_JOB_ID = re.compile(r"ftjob-[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class _Data:
    """A dataset on its way: ``identity`` says which data it is, in the fingerprint of a request."""

    dataset_id: str
    identity: str
    content: DatasetFile | ServiceFile | Remote


class TrlRemoteAdapter:
    """Provider ``remote::trl_remote``. ``datasets`` and ``datasetio`` are the stack's implementations of these APIs;
    None where the stack has them not.

    Methods raise the errors of ``errors``, and the stack's own where a dataset is not allowed to the caller.
    """

    def __init__(
        self,
        config: TrlRemoteConfig,
        *,
        datasets: Any | None,
        datasetio: Any | None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.config = config
        self.client = TrainingServiceClient(config, transport)
        self._datasets = datasets
        self._datasetio = datasetio

    async def close(self) -> None:
        await self.client.close()

    async def health(self) -> dict[str, str]:
        """In Llama Stack's words: ``status`` OK or Error, and a ``message``."""
        try:
            found = await self.client.health(quickly=True)
        except AdapterError as error:
            return {"status": "Error", "message": str(error)}
        return {"status": "OK", "message": f"{self.client.base_url} trains on {found.device or 'an unknown device'}"}

    async def supervised_fine_tune(self, request: SupervisedFineTuneRequest) -> PostTrainingJob:
        """Submit a supervised job; repeats as in ``preference_optimize``."""
        return await self._submitted(plan_sft(request, self.config))

    async def preference_optimize(self, request: PreferenceOptimizeRequest) -> PostTrainingJob:
        """Submit a DPO job. The same request under the same job_uuid is the same job, another one a conflict."""
        return await self._submitted(plan_dpo(request, self.config))

    async def get_training_jobs(self) -> ListPostTrainingJobsResponse:
        """Every job of the service, newest first, whoever submitted it."""
        jobs = [PostTrainingJob(job_uuid=job.job_uuid) async for job in self.client.jobs()]
        return ListPostTrainingJobsResponse(data=jobs)

    async def get_training_job_status(self, request: JobRequest) -> PostTrainingJobStatusResponse:
        job = await self._job(request.job_uuid)
        return job_status(job, await self.client.checkpoints(job.id), self.client.base_url)

    async def cancel_training_job(self, request: JobRequest) -> None:
        job = await self._job(request.job_uuid)
        await self.client.cancel_job(job.id)

    async def get_training_job_artifacts(self, request: JobRequest) -> PostTrainingJobArtifactsResponse:
        job = await self._job(request.job_uuid)
        checkpoints = [checkpoint_of(job, checkpoint) for checkpoint in await self.client.checkpoints(job.id)]
        return PostTrainingJobArtifactsResponse(job_uuid=job.job_uuid, checkpoints=checkpoints)

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

    async def _submitted(self, plan: JobPlan) -> PostTrainingJob:
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
        return PostTrainingJob(job_uuid=job.job_uuid)

    async def _submit(self, plan: JobPlan) -> Job:
        """What can be refused is refused first: nothing is read before it, nothing uploaded before the rows."""
        training = await self._source(plan.dataset_id)
        validation = await self._source(plan.validation_dataset_id) if plan.validation_dataset_id else None
        existing = await self.client.find_job(plan.job_uuid)
        await self._check_device()
        async with AsyncExitStack() as files:
            data = [await self._data(files, plan.dataset_id, training)]
            if validation is not None and plan.validation_dataset_id is not None:
                data.append(await self._data(files, plan.validation_dataset_id, validation))
            fingerprint = plan.fingerprint(data[0].identity, data[1].identity if validation else None)
            if existing is not None:
                return self._same_request(plan, fingerprint, existing)
            return await self._create(plan, fingerprint, data)

    async def _source(self, dataset_id: str) -> Source:
        dataset = None if self._datasets is None else await compat.get_dataset(self._datasets, dataset_id)
        tables = self._datasetio is not None
        return source_of(dataset_id, dataset, tables=tables, folders=self.config.local_folders)

    async def _data(self, files: AsyncExitStack, dataset_id: str, source: Source) -> _Data:
        """The source's content; ``files`` closes it."""
        if isinstance(source, ServiceFile):
            return _Data(dataset_id, source.file_id, source)
        if isinstance(source, Remote):
            return _Data(dataset_id, source.uri, source)
        try:
            file = await files.enter_async_context(spooled(dataset_id, source, self._datasetio, self.config.page_rows))
        except RequestRefused:
            if isinstance(source, Table) and source.importable:
                return _Data(dataset_id, source.uri, Remote(source.uri))
            raise
        return _Data(dataset_id, file.sha256, file)

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

    async def _create(self, plan: JobPlan, fingerprint: str, data: list[_Data]) -> Job:
        """Hand the data over and create the job. What was uploaded is taken back when no job comes of it."""
        uploaded: list[str] = []
        try:
            file_ids = [await self._file_id(each, uploaded) for each in data]
            body = plan.create_body(file_ids[0], file_ids[1] if len(file_ids) > 1 else None, fingerprint)
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

    async def _file_id(self, data: _Data, uploaded: list[str]) -> str:
        """The data as a file at the service, sent only if the service has not got it. Adds to ``uploaded``."""
        match data.content:
            case ServiceFile():
                return data.content.file_id
            case Remote():
                try:
                    file_id = await self.client.import_file(data.content.uri)
                except RequestRefused as error:
                    why = f": Llama Stack does not read it, and {str(error)[0].lower()}{str(error)[1:]}"
                    raise refused(data.dataset_id, data.content.uri, why) from error
            case DatasetFile():
                stored = await self.client.find_file(data.content.sha256)
                if stored is not None:
                    return stored
                file_id = await self.client.upload(data.content.file, data.content.name)
        uploaded.append(file_id)
        return file_id

    async def _discard(self, file_ids: list[str]) -> None:
        for file_id in file_ids:
            try:
                await self.client.delete_file(file_id)
            except AdapterError as error:
                # The caller gets the error that led here; this one is for the operator.
                logger.warning("The file %s stays at the training service: %s", file_id, error)
