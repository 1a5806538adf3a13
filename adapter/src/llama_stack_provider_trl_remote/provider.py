"""The provider's specification, for run configurations that name the package with ``module:``."""

from . import compat


def get_provider_spec() -> compat.RemoteProviderSpec:
    return compat.RemoteProviderSpec(
        api=compat.Api.post_training,
        adapter_type="trl_remote",
        provider_type="remote::trl_remote",
        module="llama_stack_provider_trl_remote",
        config_class="llama_stack_provider_trl_remote.config.TrlRemoteConfig",
        pip_packages=["httpx", "pydantic", "tenacity"],
        api_dependencies=[compat.Api.datasetio, compat.Api.datasets],
        description="Trains models on preference data with a remote TRL training service.",
    )
