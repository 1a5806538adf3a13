"""Llama Stack provider ``remote::trl_remote``: post_training on a TRL training service over HTTP."""

from typing import Any

from .config import TrlRemoteConfig
from .provider import get_provider_spec

__all__ = ["TrlRemoteConfig", "get_adapter_impl", "get_provider_spec"]


async def get_adapter_impl(config: TrlRemoteConfig, deps: dict[Any, Any]) -> Any:
    """What Llama Stack calls to make the provider. The service need not be up: it is first asked by a request."""
    from . import compat
    from .adapter import TrlRemoteAdapter

    return TrlRemoteAdapter(config, datasets=deps[compat.Api.datasets], datasetio=deps[compat.Api.datasetio])
