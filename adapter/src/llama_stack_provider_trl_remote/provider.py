"""The provider's specification, for run configurations that name the package with ``module:``."""

from typing import Any

from . import compat

PACKAGE = "llama_stack_provider_trl_remote"


def get_provider_spec() -> Any:
    """The installed stack's RemoteProviderSpec."""
    return compat.provider_spec(
        adapter_type="trl_remote",
        provider_type="remote::trl_remote",
        module=PACKAGE,
        config_class=f"{PACKAGE}.config.TrlRemoteConfig",
        provider_data_validator=f"{PACKAGE}.caller.TrlRemoteProviderData",
        pip_packages=["httpx", "pydantic", "tenacity"],
        description="Trains models on preference data and chats with a remote TRL training service.",
    )
