"""HTTP client of the training service: its calls as methods, its answers as objects, its failures as our errors."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from . import caller
from .config import TrlRemoteConfig
from .errors import Conflict, NotFound, RequestRefused, ServiceUnavailable
from .service import Checkpoint, CheckpointPage, FilePage, Health, Job, JobPage, ServiceObject, UploadedFile

logger = logging.getLogger(__name__)

PURPOSE = "fine-tune"
USER_AGENT = f"llama-stack-provider-trl-remote/{version('llama-stack-provider-trl-remote')}"
HEALTH_SECONDS = 0.8
PAGE = 100  # objects asked for at once, the most the service gives
TRANSIENT = frozenset({429, 502, 503, 504})
# The request may not have arrived, or its answer got lost. A read or write that timed out is not among them: it has
# used up its time already.
BROKEN_CONNECTION = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.RemoteProtocolError,
)

T = TypeVar("T", bound=ServiceObject)


class TransientAnswer(Exception):
    """An answer that asks to be tried again."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class TrainingServiceClient:
    """Talks to one training service.

    Every method raises ServiceUnavailable when the service cannot be reached, fails, or does not accept the API key;
    RequestRefused, NotFound or Conflict with the service's own message when it refuses a request.
    Everything here is safe to repeat: a submit carries a client id, and a file uploaded twice is stored once.
    """

    def __init__(self, config: TrlRemoteConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport`` replaces the network, for tests."""
        self.base_url = config.base_url
        self._config = config
        self._transport = transport
        self._http: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backoff = wait_exponential(
            multiplier=config.retries.initial_backoff_seconds, max=config.retries.max_backoff_seconds
        ) + wait_random(0, config.retries.initial_backoff_seconds)

    async def close(self) -> None:
        if self._http is not None and self._loop is asyncio.get_running_loop():
            await self._http.aclose()
        self._http = None

    async def health(self, *, quickly: bool = False) -> Health:
        """``quickly``: one attempt, in less than the second that Llama Stack gives a provider's health."""
        doing = "ask for its health"
        if quickly:
            response = await self._send("GET", "/health", doing, attempts=1, timeout=HEALTH_SECONDS)
        else:
            response = await self._send("GET", "/health", doing)
        return self._parse(Health, response)

    async def upload(self, file: BinaryIO, filename: str) -> str:
        """Upload a file from its start, streamed. Returns its id."""
        response = await self._send(
            "POST",
            "/v1/files",
            "store the dataset",
            rewind=file,
            data={"purpose": PURPOSE},
            files={"file": (filename, file, "application/octet-stream")},
        )
        return self._parse(UploadedFile, response).id

    async def find_file(self, sha256: str) -> str | None:
        """The id of a stored file with this content."""
        params = {"purpose": PURPOSE, "sha256": sha256, "limit": 1}
        page = self._parse(FilePage, await self._send("GET", "/v1/files", "look for the dataset", params=params))
        # A service that does not know the parameter answers with its newest file, whatever it is.
        return next((file.id for file in page.data if file.trl is not None and file.trl.sha256 == sha256), None)

    async def import_file(self, url: str) -> str:
        """Make the service fetch a URL, if its operator allows it. Returns the file's id."""
        body = {"url": url, "purpose": PURPOSE}
        response = await self._send(
            "POST", "/v1/files/import", "import the dataset", accepts=(403, 404, 405), json=body
        )
        if not response.is_success:
            raise RequestRefused(f"The training service at {self.base_url} refused to import it: {_reason(response)}")
        return self._parse(UploadedFile, response).id

    async def delete_file(self, file_id: str) -> None:
        await self._send("DELETE", f"/v1/files/{_segment(file_id)}", f"delete the file {file_id}")

    async def create_job(self, body: dict[str, Any]) -> Job:
        return self._parse(Job, await self._send("POST", "/v1/fine_tuning/jobs", "create the job", json=body))

    async def find_job(self, client_id: str) -> Job | None:
        """The job that was submitted under this client id."""
        response = await self._send(
            "GET", "/v1/fine_tuning/jobs", "look for the job", params={"client_id": client_id, "limit": 1}
        )
        page = self._parse(JobPage, response)
        return page.data[0] if page.data else None

    async def get_job(self, job_id: str) -> Job:
        return self._parse(Job, await self._send("GET", _job_path(job_id), f"show the job {job_id}"))

    async def cancel_job(self, job_id: str) -> Job:
        return self._parse(Job, await self._send("POST", f"{_job_path(job_id)}/cancel", f"cancel the job {job_id}"))

    async def jobs(self) -> AsyncIterator[Job]:
        """All jobs, newest first."""
        async for page in self._pages(JobPage, "/v1/fine_tuning/jobs", "list its jobs", lambda p: p.data[-1].id):
            for job in page.data:
                yield job

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """All checkpoints of a job, oldest first."""
        path = f"{_job_path(job_id)}/checkpoints"
        pages = self._pages(CheckpointPage, path, f"list checkpoints of {job_id}", lambda p: p.data[-1].id)
        found = [checkpoint async for page in pages for checkpoint in page.data]
        return sorted(found, key=lambda checkpoint: checkpoint.step_number)

    async def _pages(self, kind: type[T], path: str, doing: str, cursor: Callable[[T], str]) -> AsyncIterator[T]:
        params: dict[str, Any] = {"limit": PAGE}
        while True:
            page: Any = self._parse(kind, await self._send("GET", path, doing, params=params))
            yield page
            if not page.has_more:
                return
            if not page.data:
                raise ServiceUnavailable(
                    f"The training service at {self.base_url} answered GET {path} with an empty page and has_more"
                )
            params["after"] = cursor(page)

    async def _send(
        self,
        method: str,
        path: str,
        doing: str,
        *,
        attempts: int | None = None,
        rewind: BinaryIO | None = None,
        accepts: tuple[int, ...] = (),
        **request: Any,
    ) -> httpx.Response:
        """One request with its retries; returns a 2xx answer, or one of ``accepts``. ``doing`` completes "refused
        to ..."."""
        request["headers"] = self._headers()
        retries = AsyncRetrying(
            stop=stop_after_attempt(attempts or self._config.retries.attempts),
            wait=self._wait,
            retry=retry_if_exception(lambda e: isinstance(e, (*BROKEN_CONNECTION, TransientAnswer))),
            reraise=True,
        )
        try:
            response: httpx.Response = await retries(self._send_once, method, path, rewind, request)
        except TransientAnswer as transient:
            response = transient.response
        except httpx.TimeoutException as error:
            raise ServiceUnavailable(
                f"The training service at {self.base_url} did not answer {method} {path} in time "
                f"({type(error).__name__}): check that it is healthy, or raise the provider's timeouts"
            ) from error
        except httpx.HTTPError as error:
            raise ServiceUnavailable(
                f"The training service at {self.base_url} cannot be reached ({error or type(error).__name__}): "
                "start it, or correct the provider's base_url"
            ) from error
        if not response.is_success and response.status_code not in accepts:
            raise self._failure(response, doing)
        return response

    def _headers(self) -> dict[str, str]:
        """Of one request: the caller's key where it sent one, and the trace it belongs to."""
        key = caller.api_key() or self._config.api_key
        credentials = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        return {**caller.trace_headers(), **credentials}

    async def _send_once(
        self, method: str, path: str, rewind: BinaryIO | None, request: dict[str, Any]
    ) -> httpx.Response:
        if rewind is not None:
            rewind.seek(0)
        response = await self._client().request(method, self.base_url + path, **request)
        if response.status_code in TRANSIENT:
            raise TransientAnswer(response)
        return response

    def _client(self) -> httpx.AsyncClient:
        # Llama Stack makes its providers in an event loop that is closed before the first request is served, so the
        # client belongs to the loop it is used in. One of a closed loop cannot be closed any more, only dropped.
        loop = asyncio.get_running_loop()
        if self._http is None or self._loop is not loop:
            timeouts = self._config.timeouts
            self._http = httpx.AsyncClient(
                headers={"User-Agent": USER_AGENT},
                verify=self._config.tls.context(),
                timeout=httpx.Timeout(
                    timeouts.read_seconds, connect=timeouts.connect_seconds, write=timeouts.write_seconds
                ),
                transport=self._transport,
            )
            self._loop = loop
        return self._http

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: the service's Retry-After where it sent one, else growing."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TransientAnswer):
            asked = error.response.headers.get("Retry-After", "")
            if asked.isdecimal():
                return min(float(asked), self._config.retries.max_backoff_seconds)
        return self._backoff(state)

    def _parse(self, kind: type[T], response: httpx.Response) -> T:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ServiceUnavailable(
                f"{self.base_url} answered {response.request.method} {response.request.url.path} with something that "
                f"is no {kind.__name__} ({'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}): "
                "is the provider's base_url the training service's address?"
            ) from error

    def _failure(self, response: httpx.Response, doing: str) -> Exception:
        """The error that an answer outside 2xx stands for."""
        status = response.status_code
        reason = _reason(response)
        where = f"The training service at {self.base_url}"
        if status in (401, 403):
            return ServiceUnavailable(f"{where} refused the adapter's api_key ({status}): {reason}")
        if status == 404:
            return NotFound(f"{where} refused to {doing}: {reason}")
        if status == 409:
            return Conflict(f"{where} refused to {doing}: {reason}")
        if status in (400, 413, 415, 422):
            return RequestRefused(f"{where} refused to {doing}: {reason}")
        return ServiceUnavailable(f"{where} failed to {doing} ({status}): {reason}")


def _reason(response: httpx.Response) -> str:
    """The service's own message, or the start of an answer in another form."""
    try:
        error = response.json()["error"]
        message, param = str(error["message"]), error.get("param")
        # The message names the first bad rows of a dataset; Llama Stack's answer has no other place for the rest.
        rows = "".join(f"\n- {_row(problem)}" for problem in error.get("problems") or ())
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:500].strip() or response.reason_phrase
    return (f"{message} (param: {param})" if param and str(param) not in message else message) + rows


def _row(problem: dict[str, Any]) -> str:
    field = f", {problem['field']}" if problem.get("field") else ""
    value = f": {problem['value']}" if problem.get("value") else ""
    return f"row {problem['row']}{field} {problem['message']}{value}"


def _segment(value: str) -> str:
    return quote(value, safe="")


def _job_path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{_segment(job_id)}"
