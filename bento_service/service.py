"""``TrlTrainingService``, the Bento. It only wires: settings, store, core object, HTTP app, supervisor.

Started by ``bentoml serve bento_service.service:TrlTrainingService``, or as a script: ``python service.py``.
The process that serves, and BentoML's arbiter, which imports this module too, load no torch, transformers or trl.

Importing it loads little more than BentoML: the arbiter, which only wants the service's configuration, starts the
worker after it, and the worker loads the HTTP app and the store while its supervisor is starting beside it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is the first place imports look in; there, our modules could shadow a library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bento_service import service

    sys.exit(service.main())

import os

# Read by BentoML when it is imported and when it allocates workers. GPUs are for trainers: given to the API worker,
# they would be hidden from the count of what this host has.
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import bentoml
import structlog
from bentoml.exceptions import BentoMLException
from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento_service import __version__
from bento_service.api.late import LateApp
from bento_service.api.wire import CreateJob, DpoHyperparameters, DpoMethod, JobObject, Method
from bento_service.errors import InvalidSettings, TrlRemoteError
from bento_service.jobs.job import Job
from bento_service.jobs.keeper import SupervisorKeeper
from bento_service.logs import configure_logs
from bento_service.settings import Settings, get_settings
from bento_service.training.spec import TrlOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

log = structlog.get_logger("bento_service")


def _is_worker() -> bool:
    """Whether this process is a worker of a BentoML arbiter, which outlives a killed arbiter with its port."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return main is not None and str(main.name).startswith("_bentoml_impl.worker")


def _make_http() -> "FastAPI":
    from bento_service.api.app import create_app

    return create_app()


http = LateApp(_make_http)

# What goes to the HTTP app directly. BentoML's layers around its routes (tracing, access log, a timer per request)
# would double the cost of a status request, and its timeout counts the time that a body takes to arrive: too short
# for an upload over a slow line, and for a job whose large data file is checked row by row.
_DIRECT = ("/v1/", "/health", "/metrics")


class _GuardedService(bentoml.Service[Any]):
    """A Bento whose every route, its own ones too, is behind our guard."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        bento = super().to_asgi(is_main)

        @cache
        def guarded() -> ASGIApp:
            from bento_service.api.app import in_front_of
            from bento_service.api.bento_errors import BentoErrors

            described = BentoErrors(bento)

            async def route(scope: Scope, receive: Receive, send: Send) -> None:
                await (http.app if scope["path"].startswith(_DIRECT) else described)(scope, receive, send)

            return in_front_of(route, get_settings())

        async def start_or_answer(scope: Scope, receive: Receive, send: Send) -> None:
            await (bento if scope["type"] == "lifespan" else guarded())(scope, receive, send)

        return start_or_answer

    @property
    def openapi_spec(self) -> Any:
        """What a Bento says of its API. BentoML asks nothing but a FastAPI app for its part."""
        self.mount_apps[:] = [(http.app if app is http else app, *rest) for app, *rest in self.mount_apps]
        return super().openapi_spec


@bentoml.service(
    name="trl_training_service",
    service_class=_GuardedService,
    http={"port": 8080},
    # For BentoCloud, where a deployment may ask for another (docs/deployment.md). A host without a GPU serves as well.
    resources={"gpu": 1, "gpu_type": "nvidia-l4"},
    workers=1,
    threads=4,
    # BentoML keeps a timer of about 5 kB per request for this long, answered or not (seconds).
    traffic={"timeout": 60},
    # BentoML's own metrics have a label per path, and so one per job id.
    metrics={"enabled": False},
)
@bentoml.asgi_app(http, path="/")
class TrlTrainingService:
    """Trains models on preference data with TRL.

    The complete HTTP API, in the shape of OpenAI's fine-tuning API, is documented at `/docs`.
    The three endpoints here are its main verbs for BentoML's own clients.
    """

    def __init__(self) -> None:
        configure_logs()
        settings = get_settings()
        self._keeper = SupervisorKeeper(settings, end_with_parent=_is_worker())
        # Before the imports, which take as long as the supervisor's own. Should what follows fail, this process ends,
        # and the supervisor with it.
        self._keeper.start()

        from bento_service.files import FileStorage
        from bento_service.jobs.store import Store
        from bento_service.post_training import TrlPostTrainingImpl

        files = FileStorage(settings.files_path, settings.max_file_bytes)
        files.remove_abandoned()
        self._store = Store.open(settings.sqlalchemy_url)
        self._impl = TrlPostTrainingImpl(settings, self._store, files)
        http.app.state.impl = self._impl

    @bentoml.on_deployment
    @staticmethod
    def check_settings() -> None:
        """In BentoML's arbiter, before it starts a worker, which it would start again and again."""
        _settings_or_exit()

    @bentoml.on_startup
    def say_started(self) -> None:
        devices = self._impl.devices
        log.info("service.started", version=__version__, home=str(get_settings().home), device=devices.describe())

    @bentoml.on_shutdown
    def stop_supervisor(self) -> None:
        self._keeper.stop()
        self._store.close()
        log.info("service.stopped")

    def __is_ready__(self) -> bool:
        try:
            self._impl.count_jobs()
        except TrlRemoteError as error:
            log.error("service.not_ready", reason=error.message)
            return False
        return self._keeper.is_alive()

    @bentoml.api
    def train_dpo(
        self,
        ctx: bentoml.Context,
        model: Annotated[str, Field(description="Base model, <org>/<name>.")],
        training_file: Annotated[str, Field(description="Id of a file uploaded with POST /v1/files.")],
        validation_file: Annotated[str | None, Field(description="Id of a file of pairs that are scored.")] = None,
        hyperparameters: DpoHyperparameters | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
        trl: TrlOptions | None = None,
    ) -> dict[str, Any]:
        """Submit a DPO job: `POST /v1/fine_tuning/jobs`."""
        body = CreateJob(
            model=model,
            training_file=training_file,
            validation_file=validation_file,
            method=Method(type="dpo", dpo=DpoMethod(hyperparameters=hyperparameters or DpoHyperparameters())),
            suffix=suffix,
            seed=seed,
            metadata=metadata,
            trl=trl or TrlOptions(),
        )
        try:
            return _as_dict(self._impl.submit(body.to_request(), submitted_by=ctx.request.state.caller))
        except TrlRemoteError as error:
            raise _for_bentoml(error) from error

    @bentoml.api
    def job_status(self, job_id: str) -> dict[str, Any]:
        """Describe a job: `GET /v1/fine_tuning/jobs/{id}`."""
        try:
            return _as_dict(self._impl.status(job_id))
        except TrlRemoteError as error:
            raise _for_bentoml(error) from error

    @bentoml.api
    def cancel_job(self, job_id: str) -> dict[str, Any]:
        """Cancel a job: `POST /v1/fine_tuning/jobs/{id}/cancel`."""
        try:
            return _as_dict(self._impl.cancel(job_id))
        except TrlRemoteError as error:
            raise _for_bentoml(error) from error


def _as_dict(job: Job) -> dict[str, Any]:
    """The body of the HTTP API. Typed as a dict, since BentoML's client cannot read a null where a list may be."""
    return JobObject.of(job).model_dump(mode="json")


def _for_bentoml(error: TrlRemoteError) -> BentoMLException:
    from bento_service.api.errors import status_of

    return BentoMLException(error.message, error_code=HTTPStatus(status_of(error)))


def _settings_or_exit() -> Settings:
    try:
        return get_settings()
    except InvalidSettings as error:
        print(
            "The service does not start, since its settings cannot be used:",
            *error.problems,
            sep="\n",
            file=sys.stderr,
        )
        sys.exit(2)


def main() -> int:
    """Serve in this process, without BentoML's arbiter. Returns the exit status."""
    import uvicorn

    settings = _settings_or_exit()
    print("Starting TRL Remote Training Service...", flush=True)
    bento: Any = TrlTrainingService  # what the decorators make of the class
    app = _announced(bento.to_asgi())
    uvicorn.run(app, host=settings.host, port=settings.port, server_header=False, timeout_graceful_shutdown=10)
    return 0


def _announced(app: ASGIApp) -> ASGIApp:
    """Says on stdout that the service is up, once it is, and before uvicorn names its address."""

    async def announced(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                print("Service initialized successfully", flush=True)
            await send(message)

        await app(scope, receive, watch if scope["type"] == "lifespan" else send)

    return announced
