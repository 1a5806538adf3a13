"""The one module that knows which Llama Stack is installed.

| release | types in | provider methods take | routes |
|---|---|---|---|
| 0.2.12 to 0.3 | llama_stack.apis, llama_stack.providers | keyword arguments | built from the provider's signatures |
| 0.4 | llama_stack_api | keyword arguments | built from the provider's signatures |
| 0.5, 0.6 | llama_stack_api | one request object | a router that can be replaced |
| 0.7 | llama_stack_api, without post_training | one request object | an external API's own router |
| OGX 1 | ogx_api, without post_training and datasets | one request object | an external API's own router |

Post_training's own types are in ``protocol``, the same for all of them.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any


def _first(*names: str) -> ModuleType:
    """The first of these modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # One that is there and lacks something it imports itself is a broken environment, not another release.
            if not name.startswith(error.name or "."):
                raise
    raise ModuleNotFoundError(
        f"None of {', '.join(names)} is installed: install llama-stack or ogx beside this package"
    )


# The oldest place first: `llama stack build` of 0.2 leaves a newer release's llama_stack_api behind, and nothing of an
# older layout stays in a newer release.
_datatypes = _first("llama_stack.providers.datatypes", "llama_stack_api", "ogx_api")
Api = _datatypes.Api
_request_headers = ("ogx.core.request_headers", "llama_stack.core.request_headers")


def _stack_error(name: str) -> type[Exception] | None:
    """An error class of the stack's; 0.2.16 and earlier have none."""
    try:
        errors = _first("llama_stack.apis.common.errors", f"{_datatypes.__name__}.common.errors")
    except ModuleNotFoundError:
        return None
    found: type[Exception] | None = getattr(errors, name, None)
    return found


_NotFoundError = _stack_error("ResourceNotFoundError")
_StackError = _stack_error("LlamaStackError") or _stack_error("OGXError")

# What the stack itself answers well when a dataset cannot be read.
STACK_ERRORS: tuple[type[Exception], ...] = tuple(
    error for error in (_NotFoundError, _StackError, PermissionError) if error is not None
)

# Base of the adapter's errors. From 0.5 on the server has handlers for only a few classes, ConflictError among them;
# an error of any other class, a ValueError too, is answered and then raised on, whereupon uvicorn closes the
# connection: the next request of a client that keeps its connections open fails with a reset.
if TYPE_CHECKING:

    class AnsweredError(Exception): ...
else:
    AnsweredError = _stack_error("ConflictError") or Exception


def takes_requests() -> bool:
    """Whether the stack hands provider methods one request object (0.5 on), not keyword arguments."""
    if _datatypes.__name__ == "llama_stack.providers.datatypes":
        return False
    if has_post_training():
        return hasattr(_datatypes, "PreferenceOptimizeRequest")
    return True


def has_post_training() -> bool:
    """Whether post_training is an API of the stack's own; it is not from 0.7 on."""
    return _datatypes.__name__ == "llama_stack.providers.datatypes" or hasattr(_datatypes, "DPOAlignmentConfig")


def provider_spec(**fields: Any) -> Any:
    """A RemoteProviderSpec. Up to 0.2.22 it holds an AdapterSpec, and some fields are wanted in both."""
    dependencies = [Api(name) for name in ("datasetio", "datasets") if name in {api.value for api in Api}]
    spec = {**fields, "api": Api("post_training"), "api_dependencies": dependencies}
    kind = _datatypes.RemoteProviderSpec
    if "adapter" not in kind.model_fields:
        return kind(**spec)
    adapter = {key: value for key, value in spec.items() if key in _datatypes.AdapterSpec.model_fields}
    return kind(**{key: value for key, value in spec.items() if key in kind.model_fields}, adapter=adapter)


def dependencies(deps: dict[Any, Any]) -> dict[str, Any]:
    """The implementations that the stack hands a provider, by the names of their APIs."""
    return {api.value: implementation for api, implementation in deps.items()}


async def get_dataset(datasets: Any, dataset_id: str) -> Any | None:
    """The registered dataset, with ``source``; None where there is none of that name."""
    try:
        if _takes_request(datasets.get_dataset):
            requests = importlib.import_module("llama_stack_api.datasets")
            return await datasets.get_dataset(requests.GetDatasetRequest(dataset_id=dataset_id))
        return await datasets.get_dataset(dataset_id=dataset_id)
    except ValueError as error:
        # Up to 0.2.16 this is all that says so, in the routing table's words.
        if _NotFoundError is None and "not found" in str(error):
            return None
        if _NotFoundError is not None and isinstance(error, _NotFoundError):
            return None
        raise
    except Exception as error:
        if _NotFoundError is not None and isinstance(error, _NotFoundError):
            return None
        raise


async def read_rows(datasetio: Any, dataset_id: str, start: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """At most ``limit`` rows from row ``start`` (0-based) on, and whether there are more after them."""
    question = {"dataset_id": dataset_id, "start_index": start, "limit": limit}
    if _takes_request(datasetio.iterrows):
        requests = importlib.import_module("llama_stack_api.datasetio")
        page = await datasetio.iterrows(requests.IterRowsRequest(**question))
    else:
        page = await datasetio.iterrows(**question)
    return page.data, page.has_more


def _takes_request(method: Callable[..., Any]) -> bool:
    return "request" in inspect.signature(method).parameters


def provider_data() -> dict[str, Any]:
    """What the request being served sent in the header X-LlamaStack-Provider-Data (OGX: X-OGX-Provider-Data)."""
    headers = _first(*_request_headers, "llama_stack.distribution.request_headers")
    return dict(headers.PROVIDER_DATA_VAR.get() or {})


def serve_routes(create_router: Callable[[Any], Any]) -> None:
    """Make the server of 0.5 and 0.6 build post_training's routes with this; others have them from elsewhere."""
    if has_post_training() and takes_requests():
        registry = importlib.import_module("llama_stack.core.server.fastapi_router_registry")
        registry._ROUTER_FACTORIES["post_training"] = create_router


def answer_errors(kind: type[Exception]) -> None:
    """Make the server answer errors of ``kind`` with their own ``status_code`` and words.

    From 0.6 on it does. Before, ``translate_exception`` of its module decides, by class, and 0.2.12 to 0.2.16 know
    neither 404 nor 409 nor 502. The server of 0.2 may be the main module of the process.
    """
    for name in ("__main__", "llama_stack.core.server.server", "llama_stack.distribution.server.server"):
        server = sys.modules.get(name)
        translate = getattr(server, "translate_exception", None)
        if server is None or translate is None or getattr(translate, "answers_trl_remote", False):
            continue
        server.translate_exception = _answering(kind, translate)  # type: ignore[attr-defined]


def _answering(kind: type[Exception], translate: Callable[..., Any]) -> Callable[..., Any]:
    http_exception = importlib.import_module("fastapi").HTTPException

    def translated(error: Exception) -> Any:
        if isinstance(error, kind):
            return http_exception(status_code=getattr(error, "status_code", 500), detail=str(error))
        return translate(error)

    translated.answers_trl_remote = True  # type: ignore[attr-defined]
    return translated
