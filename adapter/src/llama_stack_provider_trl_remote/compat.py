"""The one module that knows which Llama Stack is installed: its types under neutral names, its calls as functions.

Written for Llama Stack 0.6, where provider methods take request objects.
"""

from typing import Any

from llama_stack_api import (
    Api,
    CancelTrainingJobRequest,
    Checkpoint,
    ConflictError,
    GetTrainingJobArtifactsRequest,
    GetTrainingJobStatusRequest,
    IterRowsRequest,
    JobStatus,
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    PreferenceOptimizeRequest,
    RemoteProviderSpec,
    SupervisedFineTuneRequest,
)
from llama_stack_api.common.errors import LlamaStackError
from llama_stack_api.datasets import GetDatasetRequest

__all__ = [
    "AnsweredError",
    "Api",
    "CancelTrainingJobRequest",
    "Checkpoint",
    "GetTrainingJobArtifactsRequest",
    "GetTrainingJobStatusRequest",
    "JobStatus",
    "ListPostTrainingJobsResponse",
    "LlamaStackError",
    "PostTrainingJob",
    "PostTrainingJobArtifactsResponse",
    "PostTrainingJobStatusResponse",
    "PreferenceOptimizeRequest",
    "RemoteProviderSpec",
    "SupervisedFineTuneRequest",
    "get_dataset",
    "read_rows",
]


class AnsweredError(ConflictError):
    """Base of errors that the server answers with their own ``status_code``.

    The server has handlers of its own for only a few classes, ConflictError among them, and takes the code from the
    error itself. An error of any other class, a ValueError too, is answered and then raised on, whereupon uvicorn
    closes the connection: the next request of a client that keeps its connections open fails with a reset.
    """


async def get_dataset(datasets: Any, dataset_id: str) -> Any:
    """The registered dataset, with ``source``. Raises the stack's own not-found error (404)."""
    return await datasets.get_dataset(GetDatasetRequest(dataset_id=dataset_id))


async def read_rows(datasetio: Any, dataset_id: str, start: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """At most ``limit`` rows from row ``start`` (0-based) on, and whether there are more after them."""
    page = await datasetio.iterrows(IterRowsRequest(dataset_id=dataset_id, start_index=start, limit=limit))
    return page.data, page.has_more
