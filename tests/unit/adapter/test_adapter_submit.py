"""Submitting through the adapter: order of checks, repeats, and what is left behind."""

import asyncio
from typing import Any

import httpx
import pytest
import yaml
from llama_stack_api import RemoteProviderSpec
from llama_stack_provider_trl_remote import get_provider_spec
from llama_stack_provider_trl_remote.adapter import TrlRemoteAdapter
from llama_stack_provider_trl_remote.config import TrlRemoteConfig
from llama_stack_provider_trl_remote.errors import Conflict, NotFound, RequestRefused, ServiceUnavailable
from llama_stack_provider_trl_remote.protocol import JobRequest

from tests.fake_training_service import FakeTrainingService, new_job
from tests.stack_server import REPOSITORY
from tests.unit.adapter.stack_fakes import PAIRS, FakeDatasets, dpo_request


class Recorder(httpx.AsyncBaseTransport):
    """Keeps what was asked; ``fail`` turns an answer into another one or raises."""

    def __init__(self, service: FakeTrainingService) -> None:
        self.asked: list[str] = []
        self.fail: Any = lambda request: None
        self._inner = httpx.ASGITransport(service.app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        failure = self.fail(request)
        if failure is not None:
            return failure
        return await self._inner.handle_async_request(request)


@pytest.fixture
def service() -> FakeTrainingService:
    return FakeTrainingService()


@pytest.fixture
def wire(service: FakeTrainingService) -> Recorder:
    return Recorder(service)


def make(wire: Recorder, stack: FakeDatasets | None = None, **config: Any) -> TrlRemoteAdapter:
    stack = stack or FakeDatasets(pairs=PAIRS, held_out=PAIRS[:2], bad=[{"chosen": "x"}])
    settings = TrlRemoteConfig(retries={"initial_backoff_seconds": 0, "max_backoff_seconds": 0}, **config)
    return TrlRemoteAdapter(settings, datasets=stack, datasetio=stack, transport=wire)


def test_both_datasets_are_uploaded(service: FakeTrainingService, wire: Recorder) -> None:
    request = dpo_request(data={"validation_dataset_id": "held_out"})
    assert asyncio.run(make(wire).preference_optimize(request)).job_uuid == "job-1"
    (body,) = service.bodies.values()
    assert service.files[body["training_file"]].count(b"\n") == 5
    assert service.files[body["validation_file"]].count(b"\n") == 2
    assert body["metadata"]["llama_stack_dataset"] == "pairs"


def test_a_refusal_asks_nobody(wire: Recorder) -> None:
    with pytest.raises(RequestRefused):
        asyncio.run(make(wire).preference_optimize(dpo_request(data={"packed": True})))
    assert wire.asked == []


@pytest.mark.parametrize("data", [{"dataset_id": "nowhere"}, {"validation_dataset_id": "nowhere"}])
def test_an_unknown_dataset_asks_nobody(wire: Recorder, data: dict[str, str]) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        asyncio.run(make(wire).preference_optimize(dpo_request(data=data)))
    assert wire.asked == []


def test_no_row_is_read_for_a_service_that_is_down(wire: Recorder) -> None:
    def down(request: httpx.Request) -> None:
        raise httpx.ConnectError("refused", request=request)

    wire.fail = down
    stack = FakeDatasets(pairs=PAIRS)
    with pytest.raises(ServiceUnavailable):
        asyncio.run(make(wire, stack).preference_optimize(dpo_request()))
    assert stack.limits == []


@pytest.mark.parametrize("data", [{"dataset_id": "bad"}, {"dataset_id": "bad", "validation_dataset_id": "pairs"}])
def test_a_refused_submit_leaves_no_file(service: FakeTrainingService, wire: Recorder, data: dict[str, str]) -> None:
    with pytest.raises(RequestRefused, match="rejected is missing"):
        asyncio.run(make(wire).preference_optimize(dpo_request(data=data)))
    assert service.files == {}
    assert len(service.deleted) == len(data)


def test_what_the_service_has_is_not_sent_again(service: FakeTrainingService, wire: Recorder) -> None:
    adapter = make(wire)
    asyncio.run(adapter.preference_optimize(dpo_request()))
    asyncio.run(adapter.preference_optimize(dpo_request("job-2")))
    assert wire.asked.count("POST /v1/files") == 1
    # What it had before is not taken back from it either.
    with pytest.raises(RequestRefused):
        request = dpo_request("job-3").model_copy(update={"finetuned_model": "missing/model"})
        asyncio.run(adapter.preference_optimize(request))
    assert len(service.files) == 1


def test_a_file_of_the_service_is_used_as_it_is(service: FakeTrainingService, wire: Recorder) -> None:
    service.files["file-1"] = b'{"chosen":"a","rejected":"b"}\n'
    asyncio.run(make(wire).preference_optimize(dpo_request(data={"dataset_id": "file-1"})))
    assert next(iter(service.bodies.values()))["training_file"] == "file-1"
    assert "POST /v1/files" not in wire.asked


def test_a_uri_that_the_service_imports(service: FakeTrainingService, wire: Recorder) -> None:
    allowed = "https://data.example.org/pairs.jsonl"
    service.importable[allowed] = b'{"chosen":"a","rejected":"b"}\n'
    asyncio.run(make(wire).preference_optimize(dpo_request(data={"dataset_id": allowed})))
    assert service.imported == [allowed]
    with pytest.raises(RequestRefused, match="not among the URLs"):
        other = dpo_request("job-2", data={"dataset_id": "https://data.example.org/other.jsonl"})
        asyncio.run(make(wire).preference_optimize(other))


def test_health_says_what_is_wrong(wire: Recorder) -> None:
    assert asyncio.run(make(wire).health())["status"] == "OK"

    def down(request: httpx.Request) -> None:
        raise httpx.ConnectError("refused", request=request)

    wire.fail = down
    health = asyncio.run(make(wire).health())
    assert health["status"] == "Error"
    assert "cannot be reached" in health["message"]


def test_a_second_upload_that_fails_takes_the_first_back(service: FakeTrainingService, wire: Recorder) -> None:
    def full(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(500, text="disk full") if wire.asked.count("POST /v1/files") == 2 else None

    wire.fail = full
    with pytest.raises(ServiceUnavailable, match="disk full"):
        # The failure also meets the deletion here: the error that led to it is what the caller sees.
        asyncio.run(make(wire).preference_optimize(dpo_request(data={"validation_dataset_id": "held_out"})))
    assert wire.asked.count("DELETE /v1/files/file-000000000000000000000001") == 1


def test_a_lost_answer_keeps_the_job_and_its_file(service: FakeTrainingService, wire: Recorder) -> None:
    """The job was made, its answer never came: the repeat finds it, and the clean-up did not take its file."""

    class Losing(Recorder):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            if request.method == "POST" and request.url.path.endswith("/jobs"):
                raise httpx.ReadTimeout("lost", request=request)
            return response

    with pytest.raises(ServiceUnavailable, match="did not answer"):
        asyncio.run(make(Losing(service)).preference_optimize(dpo_request()))
    assert len(service.jobs) == len(service.files) == 1
    assert asyncio.run(make(wire).preference_optimize(dpo_request())).job_uuid == "job-1"
    assert len(service.jobs) == len(service.files) == 1


def test_fifty_identical_submits_at_once_make_one_job(service: FakeTrainingService, wire: Recorder) -> None:
    adapter = make(wire)

    async def rush() -> list[Any]:
        return await asyncio.gather(*[adapter.preference_optimize(dpo_request()) for _ in range(50)])

    assert {job.job_uuid for job in asyncio.run(rush())} == {"job-1"}
    assert len(service.jobs) == 1
    assert len(service.files) == 1


def test_another_request_under_the_same_job_uuid(service: FakeTrainingService, wire: Recorder) -> None:
    stack = FakeDatasets(pairs=PAIRS)
    adapter = make(wire, stack)
    asyncio.run(adapter.preference_optimize(dpo_request()))
    with pytest.raises(Conflict, match=r"ftjob-0+1"):
        asyncio.run(adapter.preference_optimize(dpo_request(training={"n_epochs": 2})))
    stack.sources["pairs"]["rows"] = PAIRS[:3]
    with pytest.raises(Conflict):
        asyncio.run(adapter.preference_optimize(dpo_request()))
    assert len(service.jobs) == len(service.files) == 1


def test_a_submit_has_an_end(service: FakeTrainingService, wire: Recorder) -> None:
    class Stuck(FakeDatasets):
        async def get_dataset(self, request: Any) -> Any:
            await asyncio.Event().wait()

    adapter = make(wire, Stuck(pairs=PAIRS), timeouts={"submit_seconds": 0.05})
    with pytest.raises(ServiceUnavailable, match="submit_seconds"):
        asyncio.run(adapter.preference_optimize(dpo_request()))
    assert service.files == {}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_device_that_the_service_does_not_have(service: FakeTrainingService, wire: Recorder, device: str) -> None:
    adapter = make(wire, training_config={"device": device})
    if device == "cpu":
        asyncio.run(adapter.preference_optimize(dpo_request()))
        return
    with pytest.raises(RequestRefused, match=r"device is cuda, .* trains on cpu"):
        asyncio.run(adapter.preference_optimize(dpo_request()))
    assert service.files == {}


def test_jobs_that_were_submitted_elsewhere(service: FakeTrainingService, wire: Recorder) -> None:
    service.jobs["ftjob-9"] = new_job("ftjob-9", {"model": "m", "training_file": "file-9"})
    adapter = make(wire)

    async def use() -> None:
        assert [job.job_uuid for job in (await adapter.get_training_jobs()).data] == ["ftjob-9"]
        await adapter.cancel_training_job(JobRequest(job_uuid="ftjob-9"))
        status = await adapter.get_training_job_status(JobRequest(job_uuid="ftjob-9"))
        assert status.status.value == "cancelled"
        for unknown in ("ftjob-8", "nobody", ""):
            with pytest.raises(NotFound):
                await adapter.cancel_training_job(JobRequest(job_uuid=unknown))

    asyncio.run(use())


def test_the_provider_file_says_what_the_module_says() -> None:
    file = REPOSITORY / "providers.d/remote/post_training/trl_remote.yaml"
    content = yaml.safe_load(file.read_text())
    spec = get_provider_spec()
    loaded = RemoteProviderSpec(api=spec.api, provider_type="remote::trl_remote", **content)
    assert loaded == spec.model_copy(update={"description": None})
    assert content["adapter"].items() <= content.items()
