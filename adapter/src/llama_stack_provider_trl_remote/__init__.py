"""Llama Stack provider ``remote::trl_remote``: post_training on a TRL training service over HTTP."""

from typing import Any

from .config import TrlRemoteConfig
from .provider import get_provider_spec

__all__ = ["TrlRemoteConfig", "get_adapter_impl", "get_provider_spec"]


async def get_adapter_impl(config: TrlRemoteConfig, deps: dict[Any, Any]) -> Any:
    """What Llama Stack calls to make the provider. The service need not be up: it is first asked by a request."""
    from . import compat, routes
    from .adapter import TrlRemoteAdapter
    from .errors import AdapterError
    from .provider_methods import KeywordMethods, NativeRequestMethods, RequestMethods

    compat.answer_errors(AdapterError)
    if config.job_routes == "both":
        compat.serve_routes(routes.create_router)
    apis = compat.dependencies(deps)
    adapter = TrlRemoteAdapter(config, datasets=apis.get("datasets"), datasetio=apis.get("datasetio"))
    if not compat.takes_requests():
        return KeywordMethods(adapter)
    native = config.job_routes == "native" and compat.has_post_training()
    return NativeRequestMethods(adapter) if native else RequestMethods(adapter)
