"""The releases of Llama Stack and OGX that the adapter serves, and how a user of each starts and calls it."""

from dataclasses import dataclass
from pathlib import Path

PINS = Path(__file__).parent / "pins"


@dataclass(frozen=True)
class Release:
    name: str  # also of its pins: pins/<name>.in is what a user installs, pins/<name>.txt what that resolved to
    serve: tuple[str, ...]  # after the environment's python; {config} and {port} are filled in
    client: str  # the released client: module.Class
    calls: str | None  # where the client has post_training; None: only as a path
    prefix: str = "/v1alpha"  # of post_training's routes
    client_datasets: str | None = "beta.datasets"  # where the client has register
    client_takes_job_uuid: bool = True  # job.status(job_uuid=...); else only extra_query={"job_uuid": ...}
    datasets: str | None = "/v1beta/datasets"  # where datasets are registered; None: it has none
    job_in_path: bool = False  # jobs/{job_uuid}/status; else job/status?job_uuid=
    both_routes: bool = False  # the adapter answers both
    own_routes_work: bool = True  # the release's own job routes
    modules: bool = True  # providers can be named by ``module:``
    config: str = "run_remote.yaml"
    algorithm: str = "beta"  # which DPOAlignmentConfig the release documents: beta, or reward
    provider_data: str = "X-LlamaStack-Provider-Data"

    @property
    def pins(self) -> Path:
        return PINS / f"{self.name}.txt"

    def __str__(self) -> str:
        return self.name


_CLI = ("-m", "llama_stack.cli.llama", "stack", "run", "{config}", "--port", "{port}")
_CLIENT = "llama_stack_client.LlamaStackClient"

RELEASES = (
    Release(
        "0.2.12",
        ("-m", "llama_stack.distribution.server.server", "--yaml-config", "{config}", "--port", "{port}"),
        _CLIENT,
        "post_training",
        prefix="/v1",
        datasets="/v1/datasets",
        client_datasets="datasets",
        algorithm="reward",
        modules=False,
    ),
    Release(
        "0.2.15",
        ("-m", "llama_stack.distribution.server.server", "--yaml-config", "{config}", "--port", "{port}"),
        _CLIENT,
        "post_training",
        prefix="/v1",
        datasets="/v1/datasets",
        client_datasets="datasets",
        algorithm="reward",
        modules=False,
    ),
    Release(
        "0.2.16",
        ("-m", "llama_stack.distribution.server.server", "{config}", "--port", "{port}"),
        _CLIENT,
        "post_training",
        prefix="/v1",
        datasets="/v1/datasets",
        client_datasets="datasets",
    ),
    Release(
        "0.2.23",
        ("-m", "llama_stack.core.server.server", "{config}", "--port", "{port}"),
        _CLIENT,
        "post_training",
        prefix="/v1",
        datasets="/v1/datasets",
        client_datasets="datasets",
    ),
    Release("0.3.5", _CLI, _CLIENT, "alpha.post_training", client_datasets="datasets"),
    Release("0.4.7", _CLI, _CLIENT, "alpha.post_training"),
    Release(
        "0.5.4",
        _CLI,
        _CLIENT,
        "alpha.post_training",
        client_takes_job_uuid=False,
        both_routes=True,
        own_routes_work=False,
    ),
    Release(
        "0.6.1",
        _CLI,
        _CLIENT,
        "alpha.post_training",
        client_takes_job_uuid=False,
        job_in_path=True,
        both_routes=True,
    ),
    Release(
        "0.7.3",
        _CLI,
        _CLIENT,
        None,
        job_in_path=True,
        both_routes=True,
        config="run_external_api.yaml",
        modules=False,
    ),
    Release(
        "ogx-1.5.0",
        ("-m", "ogx.cli.ogx", "run", "{config}", "--port", "{port}", "--insecure"),
        "ogx_client.OgxClient",
        None,
        client_datasets=None,
        datasets=None,
        job_in_path=True,
        both_routes=True,
        config="run_ogx.yaml",
        modules=False,
        provider_data="X-OGX-Provider-Data",
    ),
)
