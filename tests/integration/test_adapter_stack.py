"""The adapter inside a real Llama Stack server, in front of a stand-in for the training service."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.fake_training_service import FakeTrainingService
from tests.stack_server import StackServer, free_port, stack_server

ROWS = [
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5", "weight": 3},
    {"prompt": "Qu'est-ce que l'été ?", "chosen": "Une saison.", "rejected": "Je ne sais pas."},
]
JOBS = "/v1alpha/post-training/jobs"


class Stack:
    """Llama Stack's HTTP API, as a user calls it."""

    def __init__(self, server: StackServer) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=60, trust_env=False)

    def register(self, source: dict[str, Any]) -> str:
        dataset_id = f"pairs-{uuid4().hex[:8]}"
        body = {"purpose": "post-training/messages", "source": source, "dataset_id": dataset_id}
        self.http.post("/v1beta/datasets", json=body).raise_for_status()
        return dataset_id

    def optimize(self, dataset_id: str, job_uuid: str | None = None, **changes: Any) -> httpx.Response:
        body: dict[str, Any] = {
            "job_uuid": job_uuid or f"job-{uuid4().hex[:8]}",
            "finetuned_model": "org/model",
            "algorithm_config": {"beta": 0.2},
            "training_config": {
                "n_epochs": 2,
                "data_config": {
                    "dataset_id": dataset_id,
                    "batch_size": 4,
                    "shuffle": False,
                    "data_format": "instruct",
                },
            },
            "hyperparam_search_config": {},
            "logger_config": {},
        }
        return self.http.post("/v1alpha/post-training/preference-optimize", json=body | changes)


@pytest.fixture(scope="module")
def service() -> FakeTrainingService:
    return FakeTrainingService(api_key="key-of-the-test")


@pytest.fixture(scope="module")
def stack(service: FakeTrainingService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("stack")
    with (
        service.serve() as url,
        stack_server(home, url, environment={"TRL_SERVICE_API_KEY": "key-of-the-test"}) as server,
    ):
        yield Stack(server)


@pytest.fixture(scope="module")
def lonely_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Its service is down."""
    home = tmp_path_factory.mktemp("lonely-stack")
    with stack_server(home, f"http://127.0.0.1:{free_port()}") as server:
        yield Stack(server)


@pytest.fixture(scope="module")
def dataset(stack: Stack) -> str:
    return stack.register({"type": "rows", "rows": ROWS})


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def test_a_job_from_submit_to_artifacts(stack: Stack, service: FakeTrainingService, dataset: str) -> None:
    response = stack.optimize(dataset, "job/with odd id")
    assert response.status_code == 200, response.text
    assert response.json() == {"job_uuid": "job/with odd id"}
    job = next(job for job in service.jobs.values() if job["trl"]["client_id"] == "job/with odd id")

    body = service.bodies[job["id"]]
    assert body["model"] == "org/model"
    assert body["method"]["dpo"]["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "beta": 0.2}
    # What the client did not send does not arrive: neither one step an epoch nor bf16.
    assert "max_steps_per_epoch" not in body["trl"]
    assert body["trl"]["precision"] == "auto"
    assert service.files[body["training_file"]].decode().splitlines() == [
        '{"chosen":"4","prompt":"What is 2 + 2?","rejected":"5","weight":3}',
        '{"chosen":"Une saison.","prompt":"Qu\'est-ce que l\'été ?","rejected":"Je ne sais pas."}',
    ]

    job_uuid = f"run-{uuid4().hex[:8]}"
    stack.optimize(dataset, job_uuid).raise_for_status()
    job = list(service.jobs.values())[-1]
    status = stack.http.get(f"{JOBS}/{job_uuid}/status").json()
    assert status["status"] == "scheduled"
    assert status["scheduled_at"] == "2023-11-14T22:13:20Z"
    assert status["resources_allocated"]["queue_position"] == 1

    job.update(status="succeeded", finished_at=1_700_000_100, fine_tuned_model="ft:org/model:x")
    job["trl"].update(started_at=1_700_000_010, progress={"step": 8, "total_steps": 8, "metrics": {"loss": 0.5}})
    service.add_checkpoint(job["id"], step=8, epoch=2.0, loss=0.5)
    status = stack.http.get(f"{JOBS}/{job_uuid}/status").json()
    assert status["status"] == "completed"
    assert status["completed_at"] == "2023-11-14T22:15:00Z"
    assert status["resources_allocated"]["metrics"] == {"loss": 0.5}
    assert status["resources_allocated"]["fine_tuned_model"] == "ft:org/model:x"

    artifacts = stack.http.get(f"{JOBS}/{job_uuid}/artifacts").json()
    assert artifacts["job_uuid"] == job_uuid
    assert [(c["path"], c["epoch"]) for c in artifacts["checkpoints"]] == [(f"/runs/{job['id']}/8", 2)]
    assert {"job_uuid": job_uuid} in stack.http.get(JOBS).json()["data"]

    late = stack.http.post(f"{JOBS}/{job_uuid}/cancel")
    assert late.status_code == 409
    assert "succeeded" in message(late)


def test_cancel(stack: Stack, dataset: str) -> None:
    job_uuid = stack.optimize(dataset).json()["job_uuid"]
    assert stack.http.post(f"{JOBS}/{job_uuid}/cancel").status_code == 200
    assert stack.http.get(f"{JOBS}/{job_uuid}/status").json()["status"] == "cancelled"


def test_the_same_request_again_is_the_same_job(stack: Stack, service: FakeTrainingService, dataset: str) -> None:
    job_uuid = stack.optimize(dataset).json()["job_uuid"]
    jobs, files = len(service.jobs), len(service.files)
    assert stack.optimize(dataset, job_uuid).json() == {"job_uuid": job_uuid}
    assert (len(service.jobs), len(service.files)) == (jobs, files)


def test_a_job_uuid_that_is_taken(stack: Stack, service: FakeTrainingService, dataset: str) -> None:
    job_uuid = stack.optimize(dataset).json()["job_uuid"]
    jobs, files = len(service.jobs), len(service.files)
    response = stack.optimize(dataset, job_uuid, algorithm_config={"beta": 0.3})
    assert response.status_code == 409
    assert job_uuid in message(response) and "use a new job_uuid" in message(response)
    assert (len(service.jobs), len(service.files)) == (jobs, files)


def test_a_local_jsonl_file(stack: Stack, service: FakeTrainingService, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b'{"chosen": "a", "rejected": "b"}\r\n{"chosen": "c", "rejected": "d"}')
    response = stack.optimize(stack.register({"type": "uri", "uri": file.as_uri()}))
    assert response.status_code == 200, response.text
    body = list(service.bodies.values())[-1]
    assert service.files[body["training_file"]] == file.read_bytes()


def test_a_table_that_the_stack_reads(stack: Stack, service: FakeTrainingService) -> None:
    service.table = b"prompt,chosen,rejected,weight\nhi,hello,no,3\nbye,see you,no,\n"
    with service.serve() as url:
        response = stack.optimize(stack.register({"type": "uri", "uri": f"{url}/table.csv"}))
    assert response.status_code == 200, response.text
    body = list(service.bodies.values())[-1]
    assert service.files[body["training_file"]].decode().splitlines() == [
        '{"chosen":"hello","prompt":"hi","rejected":"no","weight":3}',
        '{"chosen":"see you","prompt":"bye","rejected":"no"}',
    ]


def test_bad_rows_are_answered_with_the_service_s_words_and_leave_no_file(
    stack: Stack, service: FakeTrainingService
) -> None:
    files = len(service.files)
    dataset = stack.register({"type": "rows", "rows": [ROWS[0], {"prompt": "x", "chosen": "y"}]})
    response = stack.optimize(dataset)
    assert response.status_code == 400
    assert "row 2, rejected is missing" in message(response)
    assert len(service.files) == files


def test_an_unknown_model(stack: Stack, service: FakeTrainingService, dataset: str) -> None:
    files = len(service.files)
    response = stack.optimize(dataset, finetuned_model="missing/model")
    assert response.status_code == 400
    assert "missing/model was not found" in message(response)
    assert len(service.files) == files


def test_an_empty_dataset(stack: Stack) -> None:
    dataset = stack.register({"type": "rows", "rows": []})
    response = stack.optimize(dataset)
    assert response.status_code == 400
    assert f"Dataset '{dataset}' is empty" in message(response)


def test_an_unknown_dataset(stack: Stack) -> None:
    response = stack.optimize("never-registered")
    assert response.status_code == 404
    assert "never-registered" in message(response)


@pytest.mark.parametrize(
    "uri", ["lsfs://pairs.jsonl", "data:;base64,?", "/no/such/file.jsonl", "https://host.invalid/pairs.jsonl"]
)
def test_a_uri_that_cannot_be_read(stack: Stack, uri: str) -> None:
    dataset = stack.register({"type": "uri", "uri": uri})
    response = stack.optimize(dataset)
    assert response.status_code == 400
    assert dataset in message(response)


def test_an_unknown_job(stack: Stack) -> None:
    for response in (
        stack.http.get(f"{JOBS}/nobody/status"),
        stack.http.get(f"{JOBS}/ftjob-0/artifacts"),
        stack.http.post(f"{JOBS}/nobody/cancel"),
    ):
        assert response.status_code == 404, response.text


def test_what_is_refused_before_anything_is_sent(stack: Stack, service: FakeTrainingService, dataset: str) -> None:
    files = len(service.files)
    response = stack.optimize(dataset, algorithm_config={"beta": 0.1, "loss_type": "kto_pair"})
    assert response.status_code == 400
    assert "sigmoid, hinge, ipo" in message(response)
    assert len(service.files) == files


def test_a_refusal_keeps_the_connection(stack: Stack, dataset: str) -> None:
    # An error that the server only passes on is answered and then closes the connection under the next request.
    for _ in range(3):
        assert stack.optimize(dataset, algorithm_config={"beta": -1}).status_code == 400
        assert stack.http.get(JOBS).status_code == 200
    assert "Exception in ASGI application" not in stack.server.log()


def test_the_stack_starts_without_the_service_and_says_so(lonely_stack: Stack) -> None:
    dataset = lonely_stack.register({"type": "rows", "rows": ROWS})
    for response in (lonely_stack.optimize(dataset), lonely_stack.http.get(JOBS)):
        assert response.status_code == 502
        assert "cannot be reached" in message(response)


def test_a_wrong_key_is_told(service: FakeTrainingService, tmp_path: Path) -> None:
    environment = {"TRL_SERVICE_API_KEY": "another-key"}
    with service.serve() as url, stack_server(tmp_path, url, environment=environment) as server:
        response = Stack(server).http.get(JOBS)
        assert response.status_code == 502
        assert "refused the adapter's api_key" in message(response)
        assert "another-key" not in server.log()
