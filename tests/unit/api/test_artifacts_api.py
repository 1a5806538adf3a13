"""Checkpoints, manifests and result files over HTTP."""

import csv
import hashlib
import io
import json
import tarfile

import pytest

from bento_service.api.downloads import requested_range
from bento_service.jobs import result_files
from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from bento_service.training import checkpoints
from bento_service.training.events import TrainerEvent
from bento_service.training.run_directory import RunDirectory
from tests.core_factory import MODEL, request, upload

JOBS = "/v1/fine_tuning/jobs"
WEIGHTS = bytes(range(256)) * 20


@pytest.fixture
def store(impl):
    store = Store.open(impl.settings.sqlalchemy_url)
    yield store
    store.close()


@pytest.fixture
def running(impl, store):
    """A claimed job and its lease."""
    job = impl.submit(request(upload(impl).id, suffix="polite"))
    claimed = store.claim("test", host="here", free_devices=1, lease_seconds=60)
    return job, store.adopt(job.id, "test", lease_seconds=60, from_token=claimed.lease_token)


def folder_of(impl, job, step=2):
    folder = RunDirectory(impl.settings.runs_path / job.id).checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "optimizer.pt").write_bytes(b"not for others")
    return folder


def report(store, lease, impl, job):
    where = {"total_steps": 2, "epoch": 1.0, "tokens": 64}
    path = str(RunDirectory(impl.settings.runs_path / job.id).checkpoints / "checkpoint-2")
    reports = [
        ("evaluation", {"step": 0, "epoch": 0.0, "eval_loss": 0.6931}),
        ("metrics", where | {"step": 1, "loss": 0.7}),
        ("metrics", where | {"step": 2, "loss": 0.9}),
        ("metrics", where | {"step": 2, "loss": 0.5, "rewards/margins": None}),  # once more, after a crash
        ("checkpoint", {"step": 2, "epoch": 1.0, "path": path, "bytes": 9, "final": True}),
    ]
    events = [
        TrainerEvent(seq=number, time=1700000000.5, type=type, message="", data=data)
        for number, (type, data) in enumerate(reports, start=1)
    ]
    store.record(lease, events, offset=1)


@pytest.fixture
def trained(impl, store, running):
    job, lease = running
    checkpoints.complete(folder_of(impl, job), step=2, epoch=1.0, tokens=64, final=True)
    report(store, lease, impl, job)
    result_files.publish(store, impl._files, job.id)
    store.finish(lease, JobStatus.SUCCEEDED, "Training finished")
    return job


def content_url(job, step=2):
    return f"{JOBS}/{job.id}/checkpoints/{step}/content"


def test_a_checkpoint_is_downloaded_as_a_tar(client, trained):
    answer = client.get(content_url(trained))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-tar")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["accept-ranges"] == "bytes"
    assert f"{trained.id}-checkpoint-2.tar" in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames() == ["checkpoint-2/adapter_model.safetensors", "checkpoint-2/manifest.json"]
        manifest = json.load(tar.extractfile("checkpoint-2/manifest.json"))
    assert manifest["checkpoint"]["files"] == [
        {
            "name": "adapter_model.safetensors",
            "bytes": len(WEIGHTS),
            "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        }
    ]


def test_a_download_that_was_cut_off_goes_on_where_it_ended(client, trained):
    whole = client.get(content_url(trained))
    size, etag = len(whole.content), whole.headers["etag"]
    rest = client.get(content_url(trained), headers={"range": "bytes=1000-", "if-range": etag})
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    assert rest.headers["content-range"] == f"bytes 1000-{size - 1}/{size}"
    assert int(rest.headers["content-length"]) == size - 1000
    tail = client.get(content_url(trained), headers={"range": "bytes=-600"})
    assert (tail.status_code, tail.content) == (206, whole.content[-600:])
    other = client.get(content_url(trained), headers={"range": "bytes=1000-", "if-range": '"another"'})
    assert (other.status_code, other.content) == (200, whole.content)
    beyond = client.get(content_url(trained), headers={"range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert beyond.json()["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=-0", (10, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=0-1,3-4", None),
        ("lines=1-2", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_ranges(header, expected):
    assert requested_range(header, 10) == expected


def test_single_files_by_name(client, trained):
    url = f"{JOBS}/{trained.id}/checkpoints/2/files"
    answer = client.get(f"{url}/adapter_model.safetensors")
    assert (answer.status_code, answer.content) == (200, WEIGHTS)
    assert answer.headers["etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    part = client.get(
        f"{url}/adapter_model.safetensors", headers={"range": "bytes=10-19", "if-range": answer.headers["etag"]}
    )
    assert (part.status_code, part.content) == (206, WEIGHTS[10:20])


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "complete.json", "..%2f..%2fspec.json", "%2e%2e", "..%5cspec.json", "%00", "absent"]
)
def test_no_other_file_can_be_had(client, trained, name):
    answer = client.get(f"{JOBS}/{trained.id}/checkpoints/2/files/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_a_checkpoint_that_is_being_written_is_asked_for_later(client, impl, running, store):
    job, lease = running
    folder_of(impl, job)
    for url in (content_url(job), f"{JOBS}/{job.id}/checkpoints/2/files/adapter_model.safetensors"):
        answer = client.get(url)
        assert answer.status_code == 425
        assert answer.json()["error"]["code"] == "not_ready"
        assert int(answer.headers["retry-after"]) > 0
    store.finish(lease, JobStatus.CANCELLED, "Cancelled")
    assert client.get(content_url(job)).status_code == 404


@pytest.mark.parametrize(("step", "status"), [(7, 404), (-1, 400), ("x", 400), (2**40, 400)])
def test_unknown_steps(client, trained, step, status):
    answer = client.get(content_url(trained, step))
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_unknown_jobs(client):
    for path in ("checkpoints/1/content", "checkpoints/1/files/x", "manifest"):
        assert client.get(f"{JOBS}/ftjob-absent/{path}").status_code == 404


def test_a_checkpoint_that_leads_out_of_its_run_is_an_error_without_its_content(client, impl, running, tmp_path):
    job, _ = running
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    checkpoints.complete(outside, step=2, epoch=1.0, tokens=1, final=False)
    folder = RunDirectory(impl.settings.runs_path / job.id).checkpoints
    folder.mkdir(parents=True)
    (folder / "checkpoint-2").symlink_to(outside)
    answer = client.get(content_url(job))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "run_directory_unreadable")


def test_a_job_has_a_manifest_once_it_has_succeeded(client, running, trained):
    answer = client.get(f"{JOBS}/{trained.id}/manifest")
    assert answer.status_code == 404  # nothing that trained here wrote one
    assert "has no manifest" in answer.json()["error"]["message"]


def test_metrics_are_files_of_a_succeeded_job(client, trained):
    job = client.get(f"{JOBS}/{trained.id}").json()
    as_csv, as_json_lines = job["result_files"]
    rows = list(csv.DictReader(io.StringIO(client.get(f"/v1/files/{as_csv}/content").text)))
    assert [(row["type"], row["step"], row["loss"], row["eval_loss"]) for row in rows] == [
        ("evaluation", "0", "", "0.6931"),
        ("metrics", "1", "0.7", ""),
        ("metrics", "2", "0.5", ""),
    ]
    assert list(rows[0])[:5] == ["job_id", "type", "step", "epoch", "created_at"]
    lines = [json.loads(line) for line in client.get(f"/v1/files/{as_json_lines}/content").text.splitlines()]
    assert [(line["type"], line["step"]) for line in lines] == [("evaluation", 0), ("metrics", 1), ("metrics", 2)]
    assert lines[-1]["loss"] == 0.5
    assert lines[-1]["rewards/margins"] is None
    assert {line["job_id"] for line in lines} == {trained.id}
    listed = client.get("/v1/files", params={"purpose": "fine-tune-results"}).json()["data"]
    assert {file["id"]: file["filename"] for file in listed} == {
        as_csv: f"{trained.id}-metrics.csv",
        as_json_lines: f"{trained.id}-metrics.jsonl",
    }


def test_result_files_are_made_once_and_can_be_deleted(client, impl, store, trained):
    again = result_files.publish(store, impl._files, trained.id)
    files = client.get("/v1/files", params={"purpose": "fine-tune-results"}).json()["data"]
    assert sorted(file.id for file in again) == sorted(file["id"] for file in files)
    for file in again:
        assert client.delete(f"/v1/files/{file.id}").status_code == 200
        assert client.get(f"/v1/files/{file.id}/content").status_code == 404
    assert client.get(f"/v1/files/{trained.request.training_file}/content").status_code == 200


def test_a_job_that_has_not_succeeded_has_no_result_files(client, running):
    assert client.get(f"{JOBS}/{running[0].id}").json()["result_files"] == []


def test_models_are_what_is_here_and_what_was_trained(client, impl, store, trained):
    name = impl.status(trained.id).fine_tuned_model
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(model["id"], model["owned_by"], model["trl"]["kind"]) for model in models["data"]] == [
        (MODEL, "org", "base"),
        (name, "trl-remote", "trained"),
    ]
    base, made = models["data"]
    assert made["trl"] == {"kind": "trained", "base_model": MODEL, "method": "dpo", "job_id": trained.id}
    assert abs(base["created"] - made["created"]) < 60
    for model in models["data"]:
        assert client.get(f"/v1/models/{model['id']}").json() == model
        assert client.get(f"/v1/models/{model['id'].replace('/', '%2F')}").json() == model
    store.expire_artifacts(ended_before=made["created"] + 3600)
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]
    assert client.get(f"/v1/models/{name}").status_code == 404


def test_a_trained_model_can_be_deleted(client, impl, trained):
    name = impl.status(trained.id).fine_tuned_model
    folder = impl.settings.runs_path / trained.id
    assert folder.exists()
    deleted = client.delete(f"/v1/models/{name.replace('/', '%2F')}").json()
    assert deleted == {"id": name, "object": "model", "deleted": True}
    assert not folder.exists()
    assert client.get(f"{JOBS}/{trained.id}/checkpoints").json()["data"] == []
    assert client.get(f"{JOBS}/{trained.id}").json()["status"] == "succeeded"
    assert "model was deleted" in client.get(f"{JOBS}/{trained.id}/events").json()["data"][0]["message"]
    again = client.delete(f"/v1/models/{name}")
    assert (again.status_code, again.json()["error"]["param"]) == (404, "model")


def test_a_base_model_cannot_be_deleted(client, impl):
    answer = client.delete(f"/v1/models/{MODEL}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert "base model" in answer.json()["error"]["message"]
    assert (impl.settings.models_path / MODEL / "config.json").exists()
    assert client.delete("/v1/models/absent").status_code == 404


@pytest.mark.parametrize("name", ["absent", "org/absent", "../../etc", "ft:org/tiny:" + "0" * 24, "x" * 500])
def test_unknown_models(client, name):
    answer = client.get(f"/v1/models/{name.replace('/', '%2F')}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_job_that_runs_has_no_model_yet(client, running):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]


def test_every_download_goes_on_or_is_spared(client, trained):
    """Uploaded files, result files, checkpoints and their files: ranges, 304, 416 and HEAD are the same for all."""
    listed = client.get(f"{JOBS}/{trained.id}/checkpoints").json()["data"][0]["trl"]["content"]
    assert listed == content_url(trained)
    urls = [
        listed,
        f"{JOBS}/{trained.id}/checkpoints/2/files/adapter_model.safetensors",
        f"/v1/files/{trained.request.training_file}/content",
        f"/v1/files/{client.get(f'{JOBS}/{trained.id}').json()['result_files'][0]}/content",
    ]
    for url in urls:
        whole = client.get(url)
        etag, size = whole.headers["etag"], len(whole.content)
        assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes"), url
        for known in (etag, f'"other", W/{etag}', "*"):
            spared = client.get(url, headers={"if-none-match": known})
            assert (spared.status_code, spared.content, spared.headers["etag"]) == (304, b"", etag), (url, known)
        assert client.get(url, headers={"if-none-match": '"other"'}).content == whole.content
        part = client.get(url, headers={"range": "bytes=10-19", "if-range": etag})
        assert (part.status_code, part.content) == (206, whole.content[10:20]), url
        assert client.get(url, headers={"range": "bytes=10-19", "if-range": '"other"'}).content == whole.content
        beyond = client.get(url, headers={"range": f"bytes={size}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}"), url
        assert beyond.json()["error"]["code"] == "range_not_satisfiable"
        head = client.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert {**head.headers, "x-request-id": ""} == {**whole.headers, "x-request-id": ""}


def test_head_reads_nothing(client, trained, monkeypatch):
    def read(self, start, stop):
        raise AssertionError("a HEAD request read the file")
        yield

    monkeypatch.setattr("bento_service.plain_file.PlainFile.read", read)
    assert client.head(f"{JOBS}/{trained.id}/checkpoints/2/files/adapter_model.safetensors").status_code == 200
    assert client.head(f"/v1/files/{trained.request.training_file}/content").status_code == 200
    stream = client.head(f"{JOBS}/{trained.id}/events?stream=true")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert client.head(f"{JOBS}/ftjob-absent/events?stream=true").status_code == 404
