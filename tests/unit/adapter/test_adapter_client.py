"""The client of the training service: what is repeated, what is not, and what a failure says."""

import asyncio
import io
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from llama_stack_provider_trl_remote import caller
from llama_stack_provider_trl_remote.client import TrainingServiceClient
from llama_stack_provider_trl_remote.config import TrlRemoteConfig
from llama_stack_provider_trl_remote.errors import Conflict, NotFound, RequestRefused, ServiceUnavailable

from tests.fake_training_service import new_job

Answer = httpx.Response | Exception
JOB = new_job("ftjob-1", {"model": "m", "training_file": "file-1"})


class Script:
    """A transport that gives one prepared answer after another and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(await request.aread())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def client(script: Script, **config: Any) -> TrainingServiceClient:
    retries = {"initial_backoff_seconds": 0, "max_backoff_seconds": 0}
    return TrainingServiceClient(TrlRemoteConfig(retries=retries, **config), httpx.MockTransport(script))


def ask(script: Script, call: Callable[[TrainingServiceClient], Awaitable[Any]], **config: Any) -> Any:
    async def run() -> Any:
        service = client(script, **config)
        try:
            return await call(service)
        finally:
            await service.close()

    return asyncio.run(run())


def problem(status: int, message: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "param": "p", "code": "c"}}, headers=headers)


@pytest.mark.parametrize(
    "first",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("gone"),
        problem(429, "busy"),
        problem(502, "gateway"),
        problem(503, "starting"),
        problem(504, "slow"),
    ],
)
def test_what_may_pass_is_tried_again(first: Answer) -> None:
    script = Script(first, httpx.Response(200, json=JOB))
    assert ask(script, lambda c: c.create_job({"model": "m"})).id == "ftjob-1"
    assert script.bodies[0] == script.bodies[1] == b'{"model":"m"}'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(400, "bad rows"), RequestRefused),
        (problem(413, "too large"), RequestRefused),
        (problem(422, "no"), RequestRefused),
        (problem(404, "no such job"), NotFound),
        (problem(409, "taken"), Conflict),
        (problem(401, "who are you"), ServiceUnavailable),
        (problem(403, "not you"), ServiceUnavailable),
        (problem(500, "broken"), ServiceUnavailable),
        (httpx.ReadTimeout("slow"), ServiceUnavailable),
    ],
)
def test_what_will_not_pass_is_asked_once(answer: Answer, error: type[Exception]) -> None:
    script = Script(answer)
    with pytest.raises(error) as caught:
        ask(script, lambda c: c.get_job("ftjob-1"))
    assert "http://localhost:8080" in str(caught.value)
    if isinstance(answer, httpx.Response):
        assert answer.json()["error"]["message"] in str(caught.value)


def test_it_gives_up_after_the_configured_attempts() -> None:
    script = Script(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(ServiceUnavailable, match=r"cannot be reached \(refused\)"):
        ask(script, lambda c: c.health())
    assert not script.answers
    script = Script(*[problem(503, "starting up")] * 3)
    with pytest.raises(ServiceUnavailable, match="starting up"):
        ask(script, lambda c: c.health())
    assert not script.answers


def test_retry_after_is_kept_up_to_the_longest_wait() -> None:
    script = Script(problem(429, "busy", **{"Retry-After": "0"}), httpx.Response(200, json=JOB))

    async def timed() -> float:
        config = TrlRemoteConfig(retries={"initial_backoff_seconds": 60, "max_backoff_seconds": 60})
        service = TrainingServiceClient(config, httpx.MockTransport(script))
        start = asyncio.get_running_loop().time()
        await service.get_job("ftjob-1")
        return asyncio.get_running_loop().time() - start

    assert asyncio.run(timed()) < 30


def test_an_upload_is_sent_from_its_start_each_time() -> None:
    uploaded = httpx.Response(200, json={"id": "file-1"})
    script = Script(httpx.ReadError("reset"), uploaded)
    data = io.BytesIO(b'{"chosen":"a"}\n')
    data.read()
    assert ask(script, lambda c: c.upload(data, 'odd"\r\nname.jsonl')) == "file-1"
    assert all(b'{"chosen":"a"}\n' in body and b"fine-tune" in body for body in script.bodies)
    assert b'odd"\r\nname' not in script.bodies[1]


def test_the_key_is_sent_and_ids_are_escaped() -> None:
    script = Script(httpx.Response(200, json=JOB))
    ask(script, lambda c: c.get_job("../files?x"), api_key="secret", base_url="http://gpu:8080/v1")
    assert script.requests[0].headers["Authorization"] == "Bearer secret"
    assert script.requests[0].url.raw_path == b"/v1/fine_tuning/jobs/..%2Ffiles%3Fx"


def test_the_caller_s_own_key_and_trace_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    data: dict[str, Any] = {"trl_remote_api_key": "mine", "other_provider_key": 3}
    monkeypatch.setattr(caller.compat, "provider_data", lambda: data)
    script = Script(httpx.Response(200, json=JOB))
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "cookie": "no"}
    with caller.traced(trace):
        ask(script, lambda c: c.get_job("ftjob-1"), api_key="the-provider-s")
    sent = script.requests[0].headers
    assert sent["Authorization"] == "Bearer mine"
    assert sent["traceparent"] == trace["traceparent"]
    assert "cookie" not in sent
    assert re.fullmatch(r"llama-stack-provider-trl-remote/\d+\.\d+\.\d+", sent["User-Agent"])
    for bad in (3, "two words", "line\nbreak"):
        data["trl_remote_api_key"] = bad
        with pytest.raises(RequestRefused, match="trl_remote_api_key") as caught:
            ask(Script(), lambda c: c.get_job("ftjob-1"))
        assert repr(bad) not in str(caught.value)


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(200, json={"id": 3})])
def test_an_answer_of_something_else_is_told(answer: httpx.Response) -> None:
    with pytest.raises(ServiceUnavailable, match=r"is no Job .*base_url"):
        ask(Script(answer), lambda c: c.get_job("ftjob-1"))


def test_an_error_that_is_no_json_is_quoted() -> None:
    with pytest.raises(ServiceUnavailable, match="nginx says no"):
        ask(Script(httpx.Response(500, text="nginx says no")), lambda c: c.health())


def test_all_pages_are_read() -> None:
    def page(ids: list[str], more: bool) -> httpx.Response:
        return httpx.Response(200, json={"data": [{**JOB, "id": i} for i in ids], "has_more": more})

    async def listed(c: TrainingServiceClient) -> list[str]:
        return [job.id async for job in c.jobs()]

    script = Script(page(["a", "b"], True), page(["c"], False))
    assert ask(script, listed) == ["a", "b", "c"]
    assert script.requests[1].url.params["after"] == "b"
    with pytest.raises(ServiceUnavailable, match="empty page"):
        ask(Script(page([], True)), listed)


def test_a_client_of_a_closed_loop_is_replaced() -> None:
    # Llama Stack makes its providers in a loop that is closed before the first request.
    script = Script(httpx.Response(200, json=JOB), httpx.Response(200, json=JOB))
    service = client(script)
    asyncio.run(service.get_job("ftjob-1"))
    assert asyncio.run(service.get_job("ftjob-1")).id == "ftjob-1"
