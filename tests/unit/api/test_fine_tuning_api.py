"""``/v1/fine_tuning/jobs`` over HTTP, by hand and through OpenAI's own client."""

import openai
import pytest

from bento_service.api.app import create_app, in_front_of
from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from bento_service.training.events import TrainerEvent
from tests.core_factory import MODEL, PAIRS, json_lines, request, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def file_id(impl):
    return upload(impl).id


@pytest.fixture
def body(file_id):
    return {"model": MODEL, "training_file": file_id}


@pytest.fixture
def trained(impl, file_id):
    """A job that a trainer has reported two steps and a checkpoint of, and that has succeeded."""
    job = impl.submit(request(file_id))
    store = Store.open(impl.settings.sqlalchemy_url)
    claimed = store.claim("test", host="here", free_devices=1, lease_seconds=60)
    lease = store.adopt(job.id, "test", lease_seconds=60, from_token=claimed.lease_token)
    where = {"step": 2, "total_steps": 2, "epoch": 1.0, "tokens": 64}
    checkpoint = {"step": 2, "epoch": 1.0, "path": "/runs/x/checkpoints/checkpoint-2", "bytes": 9, "final": True}
    reports = [
        ("metrics", "Step 2 of 2", where | {"loss": 0.5, "rewards/margins": 0.25}),
        ("evaluation", "Evaluated", {"step": 2, "epoch": 1.0, "eval_loss": 0.625}),
        ("checkpoint", "Saved", checkpoint),
    ]
    events = [
        TrainerEvent(seq=number, time=1700000000.5, type=type, message=message, data=data)
        for number, (type, message, data) in enumerate(reports, start=1)
    ]
    store.record(lease, events, offset=1)
    store.finish(lease, JobStatus.SUCCEEDED, "Training finished")
    store.close()
    return job.id


def test_a_submitted_job_answers_every_field(client, body):
    given = {"beta": 0.2, "batch_size": "auto", "n_epochs": 2}
    answer = client.post(
        JOBS,
        json=body
        | {
            "method": {"type": "dpo", "dpo": {"hyperparameters": given}},
            "suffix": "polite",
            "metadata": {"team": "a"},
            "trl": {"client_id": "mine", "lora": {"rank": 4}},
        },
    )
    assert answer.status_code == 200
    job = answer.json()
    assert job["status"] == "queued"
    assert job["method"]["dpo"]["hyperparameters"] == {
        "beta": 0.2,
        "batch_size": 8,
        "learning_rate_multiplier": "auto",
        "n_epochs": 2,
    }
    assert (job["organization_id"], job["result_files"], job["integrations"], job["error"]) == ("", [], None, None)
    assert (job["metadata"], job["seed"], job["fine_tuned_model"]) == ({"team": "a"}, 42, None)
    assert isinstance(job["created_at"], int)
    assert job["trl"]["options"]["lora"]["rank"] == 4
    assert (job["trl"]["client_id"], job["trl"]["queue_position"], job["trl"]["attempt"]) == ("mine", 1, 0)
    assert job["trl"]["resolved"]["learning_rate"] == pytest.approx(1e-5)
    assert job["trl"].pop("estimated_start") >= job["created_at"]
    again = client.get(f"{JOBS}/{job['id']}").json()
    assert again["trl"].pop("estimated_start") >= job["created_at"]
    assert again == job


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"modle": "x"}, "modle", "unknown key 'modle': did you mean 'model'?"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"bta": 1}}}},
            "method.dpo.hyperparameters.bta",
            "unknown key 'bta' in method.dpo.hyperparameters: did you mean 'beta'?",
        ),
        ({"trl": {"lora": {"rnk": 8}}}, "trl.lora.rnk", "did you mean 'rank'?"),
        ({"trl": {"zzz": 8}}, "trl.zzz", "known keys here are"),
        ({"trl": {"lora": {"rank": 0}}}, "trl.lora.rank", "greater than or equal to 1"),
        ({"trl": {"lora": {"target_modules": 3}}}, "trl.lora.target_modules", "target_modules"),
        ({"trl": {"dpo": {"loss_type": ["sigmoid"], "loss_weights": [1, 2]}}}, "trl.dpo", "2 values for 1 loss"),
        ({"trl": {"dpo": {"loss_type": ["sigmodi"]}}}, "trl.dpo.loss_type.0", "sigmoid"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 0}}}},
            "method.dpo.hyperparameters.batch_size",
            "greater than or equal to 1",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "big"}}}},
            "method.dpo.hyperparameters.beta",
            "valid number",
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", "'dpo'"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "settings of supervised"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters", "method.dpo.hyper"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "16"),
        ({"suffix": "a/b"}, "suffix", "pattern"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "0 items"),
        ({"training_file": "file-absent"}, "training_file", "POST /v1/files"),
        ({"model": "org/absent"}, "model", MODEL),
        ({"trl": {"devices": 3}}, "trl.devices", "3 devices"),
    ],
)
def test_a_bad_body_is_refused_with_what_where_and_what_to_do(client, impl, body, change, param, says):
    answer = client.post(JOBS, json=body | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert says in error["message"]
    assert impl.list_jobs().data == []


def test_all_missing_fields_are_named(client):
    error = client.post(JOBS, json={}).json()["error"]
    assert "model: Field required" in error["message"]
    assert "training_file: Field required" in error["message"]


@pytest.mark.parametrize("content", [b'{"model": ', b"[]", b"", b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(client, content):
    answer = client.post(JOBS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_bad_rows_are_listed(client, impl):
    bad = upload(impl, [*PAIRS, {"prompt": "p", "chosen": "c"}]).id
    answer = client.post(JOBS, json={"model": MODEL, "training_file": bad})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_dataset", "training_file")
    assert error["total_problems"] == 1
    assert (error["container"], error["format"], error["rows"], error["counts"]) == (
        "jsonl",
        "text",
        3,
        {"missing": 1},
    )
    assert (error["problems"][0]["code"], error["problems"][0]["message"]) == ("missing", "is missing")
    assert (error["problems"][0]["row"], error["problems"][0]["field"]) == (3, "rejected")


def test_a_body_over_a_mebibyte_is_refused(client, body):
    long = body | {"metadata": {"k": "x" * (1 << 20)}}
    assert client.post(JOBS, json=long).status_code == 413

    def chunks():
        for _ in range(20):
            yield b" " * (1 << 16)

    answer = client.post(JOBS, content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_a_client_id_is_one_job(client, body):
    mine = body | {"trl": {"client_id": "mine"}}
    job = client.post(JOBS, json=mine).json()
    assert client.post(JOBS, json=mine).json()["id"] == job["id"]
    other = client.post(JOBS, json=mine | {"seed": 7})
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "client_id_conflict"
    assert other.headers["x-should-retry"] == "false"
    assert [found["id"] for found in client.get(JOBS, params={"client_id": "mine"}).json()["data"]] == [job["id"]]
    assert client.get(JOBS, params={"client_id": "nobody's"}).json()["data"] == []


def test_jobs_are_listed_newest_first_by_page_and_by_metadata(client, body):
    ids = [client.post(JOBS, json=body | {"metadata": {"n": str(n), "team": "a"}}).json()["id"] for n in range(3)]
    page = client.get(JOBS, params={"limit": 2}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    page = client.get(JOBS, params={"limit": 2, "after": ids[1]}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([ids[0]], False)
    page = client.get(JOBS, params={"metadata[n]": "1", "metadata[team]": "a"}).json()
    assert [job["id"] for job in page["data"]] == [ids[1]]
    without = client.post(JOBS, json=body).json()["id"]
    assert [job["id"] for job in client.get(JOBS, params={"metadata": "null"}).json()["data"]] == [without]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"{JOBS}?limit=0", "limit"),
        (f"{JOBS}?limit=101", "limit"),
        (f"{JOBS}?metadata=x", "metadata"),
        (f"{JOBS}?metadata=null&metadata[a]=b", "metadata"),
        (f"{JOBS}/x/events?order=up", "order"),
    ],
)
def test_bad_list_parameters_are_refused(client, path, param):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_unknown_job_is_not_found_anywhere(client):
    for method, path in [
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
    ]:
        answer = client.request(method, f"{JOBS}/ftjob-absent{path}")
        assert answer.status_code == 404
        assert "ftjob-absent" in answer.json()["error"]["message"]


def test_cancel_pause_and_resume(client, body):
    job_id = client.post(JOBS, json=body).json()["id"]
    assert client.post(f"{JOBS}/{job_id}/pause").json()["status"] == "paused"
    assert client.post(f"{JOBS}/{job_id}/resume").json()["status"] == "queued"
    cancelled = client.post(f"{JOBS}/{job_id}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert isinstance(cancelled["finished_at"], int)
    again = client.post(f"{JOBS}/{job_id}/resume")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "transition_refused")


def test_a_trained_job_has_its_events_and_checkpoints(client, trained):
    job = client.get(f"{JOBS}/{trained}").json()
    assert (job["status"], job["trained_tokens"]) == ("succeeded", 64)
    assert job["fine_tuned_model"].startswith(f"ft:{MODEL}:")
    assert job["trl"]["progress"]["metrics"]["rewards/margins"] == 0.25

    newest = client.get(f"{JOBS}/{trained}/events").json()["data"]
    oldest = client.get(f"{JOBS}/{trained}/events", params={"order": "asc"}).json()["data"]
    assert newest == oldest[::-1]
    assert [event["data"]["seq"] for event in oldest] == list(range(1, len(oldest) + 1))
    metrics = next(event for event in oldest if event["data"]["type"] == "metrics")
    assert (metrics["type"], metrics["data"]["loss"], metrics["created_at"]) == ("metrics", 0.5, 1700000000)
    after = client.get(f"{JOBS}/{trained}/events", params={"order": "asc", "after": oldest[2]["id"], "limit": 1})
    assert (after.json()["data"], after.json()["has_more"]) == ([oldest[3]], True)

    (checkpoint,) = client.get(f"{JOBS}/{trained}/checkpoints").json()["data"]
    assert checkpoint["metrics"] == {"step": 2, "train_loss": 0.5, "valid_loss": 0.625}
    assert checkpoint["fine_tuned_model_checkpoint"] == f"{job['fine_tuned_model']}:ckpt-step-2"
    assert (checkpoint["trl"]["final"], checkpoint["trl"]["bytes"]) == (True, 9)
    assert checkpoint["trl"]["path"].endswith("checkpoint-2")


def test_openais_client_reads_every_answer(impl, trained):
    official = openai.OpenAI(base_url="http://localhost:8080/v1", api_key="unused", http_client=_transport(impl))
    file = official.files.create(file=("pairs.jsonl", json_lines(PAIRS)), purpose="fine-tune")
    job = official.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": "auto"}}},
        metadata={"k": "v"},
        extra_body={"trl": {"client_id": "official", "max_steps": 3}},
    )
    assert job.method.dpo.hyperparameters.beta == 0.5
    assert official.fine_tuning.jobs.retrieve(job.id).method == job.method
    assert [found.id for found in official.fine_tuning.jobs.list(limit=1)] == [job.id, trained]
    assert [found.id for found in official.fine_tuning.jobs.list(metadata={"k": "v"})] == [job.id]
    assert official.fine_tuning.jobs.pause(job.id).id == job.id
    assert official.fine_tuning.jobs.resume(job.id).status == "queued"
    assert official.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        official.fine_tuning.jobs.resume(job.id)
    with pytest.raises(openai.NotFoundError):
        official.fine_tuning.jobs.retrieve("ftjob-absent")

    events = list(official.fine_tuning.jobs.list_events(trained, limit=2))
    assert [event.data["seq"] for event in events] == list(range(len(events), 0, -1))
    (checkpoint,) = official.fine_tuning.jobs.checkpoints.list(trained)
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (2, 0.5)

    assert official.files.content(file.id).content == json_lines(PAIRS)
    assert next(iter(official.files.list())).id == file.id
    result = next(iter(official.files.list(purpose="fine-tune", order="asc", limit=1)))
    model = next(iter(official.models.list()))
    deleted = official.files.delete(file.id)
    assert deleted.deleted is True
    with pytest.raises(openai.BadRequestError, match="do not expire"):
        official.files.create(
            file=("p.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    for answer in (
        official.fine_tuning.jobs.retrieve(trained),
        job,
        *events,
        checkpoint,
        file,
        result,
        model,
        deleted,
    ):
        _require_typed(answer)


def _transport(impl):
    import httpx2
    from starlette.testclient import TestClient

    app = in_front_of(create_app(impl), impl.settings)
    inner = TestClient(app, base_url="http://localhost:8080", client=("127.0.0.1", 50000))

    def handle(request):
        answer = inner.request(request.method, str(request.url), content=request.read(), headers=dict(request.headers))
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return httpx2.Client(transport=httpx2.MockTransport(handle))


def _require_typed(answer):
    """OpenAI's client builds its objects without checking; this checks that all is there, as their types say."""
    given = answer.to_dict(exclude_unset=True, mode="json")
    assert set(type(answer).model_fields) <= set(given), type(answer).__name__
    type(answer).model_validate_json(answer.to_json(exclude_unset=True), strict=True)
