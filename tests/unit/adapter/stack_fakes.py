"""The stack's side of the adapter without a stack: datasets and datasetio over rows in memory."""

from typing import Any

import pandas
from llama_stack_api.common.errors import DatasetNotFoundError
from llama_stack_api.common.responses import PaginatedResponse
from llama_stack_api.datasets import Dataset, GetDatasetRequest
from llama_stack_provider_trl_remote.protocol import PreferenceOptimizeRequest, SupervisedFineTuneRequest

PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]


def dataset(dataset_id: str, source: dict[str, Any]) -> Dataset:
    return Dataset(identifier=dataset_id, provider_id="localfs", purpose="post-training/messages", source=source)


class FakeDatasets:
    """Both APIs. Rows go through pandas, as in localfs."""

    def __init__(self, **rows: list[dict[str, Any]]) -> None:
        self.sources: dict[str, dict[str, Any]] = {k: {"type": "rows", "rows": v} for k, v in rows.items()}
        self.limits: list[int | None] = []

    async def get_dataset(self, request: GetDatasetRequest) -> Dataset:
        if request.dataset_id not in self.sources:
            raise DatasetNotFoundError(request.dataset_id)
        return dataset(request.dataset_id, self.sources[request.dataset_id])

    async def iterrows(self, request: Any) -> PaginatedResponse:
        self.limits.append(request.limit)
        records = pandas.DataFrame(self.sources[request.dataset_id]["rows"]).to_dict("records")
        end = request.start_index + request.limit
        return PaginatedResponse(data=records[request.start_index : end], has_more=end < len(records))


def dpo_request(
    job_uuid: str = "job-1",
    *,
    training: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    extras: dict[str, Any] | None = None,
    logger: dict[str, Any] | None = None,
) -> PreferenceOptimizeRequest:
    """A request as the server makes it from a body: fields that are not named here count as not sent."""
    return PreferenceOptimizeRequest.model_validate(
        {
            "job_uuid": job_uuid,
            "finetuned_model": "org/model",
            "algorithm_config": {"beta": 0.1} if algorithm is None else algorithm,
            "training_config": _training(training, data),
            "hyperparam_search_config": extras or {},
            "logger_config": logger or {},
        }
    )


def sft_request(
    *, training: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **changes: Any
) -> SupervisedFineTuneRequest:
    body = {
        "job_uuid": "job-1",
        "model": "org/model",
        "training_config": _training(training, data),
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return SupervisedFineTuneRequest.model_validate(body | changes)


def _training(training: dict[str, Any] | None, data: dict[str, Any] | None) -> dict[str, Any]:
    data_config = {"dataset_id": "pairs", "batch_size": 4, "shuffle": True, "data_format": "dialog", **(data or {})}
    return {"n_epochs": 1, "data_config": data_config, **(training or {})}
