"""The provider as Llama Stack calls it: by keyword arguments up to 0.4, with one request object from 0.5 on.

The routes of 0.4 and earlier are made from these signatures, so annotations must be objects, not text
(no ``from __future__ import annotations`` here), and a parameter in ``Annotated`` keeps its place in the request.
"""

from typing import Annotated, Any

from fastapi import Body as InBody
from fastapi import Header
from pydantic import BaseModel

from .adapter import TrlRemoteAdapter
from .caller import traced
from .protocol import (
    Body,
    JobRequest,
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    PreferenceAlgorithm,
    PreferenceOptimizeRequest,
    SupervisedAlgorithm,
    SupervisedFineTuneRequest,
    TrainingConfig,
)

Text = Annotated[str, InBody(embed=True)]
Options = Annotated[dict[str, Any], InBody(embed=True)]
Trace = Annotated[str | None, Header()]


class _Methods:
    def __init__(self, adapter: TrlRemoteAdapter) -> None:
        self.adapter = adapter

    async def initialize(self) -> None:
        """Nothing: the stack starts whether or not the service is up."""

    async def shutdown(self) -> None:
        await self.adapter.close()

    async def health(self) -> dict[str, Any]:
        found = await self.adapter.health()
        # Llama Stack up to 0.2 looks for the answer by provider id, later ones for the answer itself.
        return {**found, getattr(self, "__provider_id__", "trl_remote"): found}


class KeywordMethods(_Methods):
    async def supervised_fine_tune(
        self,
        job_uuid: Text,
        training_config: Annotated[TrainingConfig, InBody(embed=True)],
        hyperparam_search_config: Options,
        logger_config: Options,
        model: Annotated[str | None, InBody(embed=True)] = None,
        checkpoint_dir: Annotated[str | None, InBody(embed=True)] = None,
        algorithm_config: Annotated[SupervisedAlgorithm | None, InBody(embed=True)] = None,
        traceparent: Trace = None,
        tracestate: Trace = None,
        baggage: Trace = None,
    ) -> PostTrainingJob:
        request = SupervisedFineTuneRequest(
            job_uuid=job_uuid,
            training_config=training_config,
            hyperparam_search_config=hyperparam_search_config,
            logger_config=logger_config,
            model=model,
            checkpoint_dir=checkpoint_dir,
            algorithm_config=algorithm_config,
        )
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            return await self.adapter.supervised_fine_tune(request)

    async def preference_optimize(
        self,
        job_uuid: Text,
        finetuned_model: Text,
        algorithm_config: Annotated[PreferenceAlgorithm, InBody(embed=True)],
        training_config: Annotated[TrainingConfig, InBody(embed=True)],
        hyperparam_search_config: Options,
        logger_config: Options,
        traceparent: Trace = None,
        tracestate: Trace = None,
        baggage: Trace = None,
    ) -> PostTrainingJob:
        request = PreferenceOptimizeRequest(
            job_uuid=job_uuid,
            finetuned_model=finetuned_model,
            algorithm_config=algorithm_config,
            training_config=training_config,
            hyperparam_search_config=hyperparam_search_config,
            logger_config=logger_config,
        )
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            return await self.adapter.preference_optimize(request)

    async def get_training_jobs(
        self, traceparent: Trace = None, tracestate: Trace = None, baggage: Trace = None
    ) -> ListPostTrainingJobsResponse:
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            return await self.adapter.get_training_jobs()

    async def get_training_job_status(
        self, job_uuid: str, traceparent: Trace = None, tracestate: Trace = None, baggage: Trace = None
    ) -> PostTrainingJobStatusResponse:
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            return await self.adapter.get_training_job_status(JobRequest(job_uuid=job_uuid))

    async def cancel_training_job(
        self, job_uuid: Text, traceparent: Trace = None, tracestate: Trace = None, baggage: Trace = None
    ) -> None:
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            await self.adapter.cancel_training_job(JobRequest(job_uuid=job_uuid))

    async def get_training_job_artifacts(
        self, job_uuid: str, traceparent: Trace = None, tracestate: Trace = None, baggage: Trace = None
    ) -> PostTrainingJobArtifactsResponse:
        with traced({"traceparent": traceparent, "tracestate": tracestate, "baggage": baggage}):
            return await self.adapter.get_training_job_artifacts(JobRequest(job_uuid=job_uuid))


class RequestMethods(_Methods):
    """Requests are this package's, or Llama Stack's own where its own routes are served: the same fields."""

    async def supervised_fine_tune(self, request: Any) -> PostTrainingJob:
        return await self.adapter.supervised_fine_tune(_as(SupervisedFineTuneRequest, request))

    async def preference_optimize(self, request: Any) -> PostTrainingJob:
        return await self.adapter.preference_optimize(_as(PreferenceOptimizeRequest, request))

    async def get_training_jobs(self) -> ListPostTrainingJobsResponse:
        return await self.adapter.get_training_jobs()

    async def get_training_job_status(self, request: Any) -> PostTrainingJobStatusResponse:
        return await self.adapter.get_training_job_status(_as(JobRequest, request))

    async def cancel_training_job(self, request: Any) -> None:
        await self.adapter.cancel_training_job(_as(JobRequest, request))

    async def get_training_job_artifacts(self, request: Any) -> PostTrainingJobArtifactsResponse:
        return await self.adapter.get_training_job_artifacts(_as(JobRequest, request))


def _as(kind: type[Body], request: Any) -> Any:
    if isinstance(request, kind):
        return request
    # What was not sent stays unsent: the stack's defaults are no wish of the client's.
    return kind.model_validate(request.model_dump(mode="json", exclude_unset=True))


class NativeRequestMethods(RequestMethods):
    """For the routes of 0.5 and 0.6 themselves, which take no answers but their own types: plain values pass."""

    async def supervised_fine_tune(self, request: Any) -> Any:
        return _plain(await super().supervised_fine_tune(request))

    async def preference_optimize(self, request: Any) -> Any:
        return _plain(await super().preference_optimize(request))

    async def get_training_jobs(self) -> Any:
        return _plain(await super().get_training_jobs())

    async def get_training_job_status(self, request: Any) -> Any:
        return _plain(await super().get_training_job_status(request))

    async def get_training_job_artifacts(self, request: Any) -> Any:
        return _plain(await super().get_training_job_artifacts(request))


def _plain(answer: BaseModel) -> dict[str, Any]:
    """Without metrics of which some were not measured: Llama Stack's own type wants all of them."""
    plain = answer.model_dump(mode="json")
    for checkpoint in plain.get("checkpoints", ()):
        if None in (checkpoint["training_metrics"] or {}).values():
            checkpoint["training_metrics"] = None
    return plain
