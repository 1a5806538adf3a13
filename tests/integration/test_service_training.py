"""One job all the way: uploaded, submitted and trained by a real service with OpenAI's client, on a tiny model."""

import hashlib
import io
import json
import tarfile
import time
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from bento_service.jobs.store import Store
from tests.bento_server import bento_server
from tests.core_factory import PAIRS, json_lines
from tests.tiny_model import make_tiny_model
from tests.trainer_run import chat_rows

MODEL = "org/tiny-trained"
BROKEN = "org/without-weights"
TRAINING_SECONDS = 180


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    make_tiny_model(models / MODEL)
    (models / BROKEN).mkdir()
    (models / BROKEN / "config.json").write_text('{"model_type": "llama"}')
    return models


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    spares = {"TRL_WARM_TRAINERS": "1"}
    with bento_server(tmp_path_factory.mktemp("service"), models=models, environment=spares) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    # Not through a proxy that the machine may have.
    transport = httpx2.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=transport) as client:
        yield client


def ended(client, job_id, server):
    deadline = time.monotonic() + TRAINING_SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"job {job_id} has not ended:\n{server.log()}")


def wait_for_spare(server):
    """The spare trainer, past its interpreter's start; it takes a job in the middle of its imports, too."""
    deadline = time.monotonic() + TRAINING_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.Process(server.process.pid).children(recursive=True):
            try:
                if "--spare" in process.cmdline() and process.memory_info().rss > 2**28:
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    raise AssertionError(f"there is no spare trainer:\n{server.log()}")


def test_a_job_is_trained_and_followed(client, server):
    spare = wait_for_spare(server)
    file = client.files.create(file=("pairs.jsonl", json_lines(PAIRS * 4)), purpose="fine-tune")
    submitted = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 2, "n_epochs": 1}}},
        extra_body={"trl": {"max_length": 64}},
    )
    job = ended(client, submitted.id, server)
    assert job.status == "succeeded", (job.error, server.log())
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:")
    assert job.trained_tokens > 0
    store = Store.open(f"sqlite:///{server.home / 'trl-remote.db'}")
    assert [attempt.pid for attempt in store.list_attempts(job.id)] == [spare.pid]
    store.close()
    assert not spare.is_running()

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))[::-1]
    assert [event.data["seq"] for event in events] == list(range(1, len(events) + 1))
    states = [event.data["to"] for event in events if event.data["type"] == "state"]
    assert states == ["validating_files", "queued", "running", "succeeded"]
    losses = [event.data["loss"] for event in events if event.data["type"] == "metrics" and "loss" in event.data]
    assert len(losses) == 4  # 8 pairs, 2 a step
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are the same at the start

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4]
    final = checkpoints[0]
    assert final.trl["final"] is True
    assert (Path(final.trl["path"]) / "adapter_model.safetensors").is_file()
    assert Path(final.trl["path"]).is_relative_to(server.home)


def test_what_was_trained_is_downloaded_and_loads(client, server, models, tmp_path):
    content = json_lines(PAIRS * 2)
    file = client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
    submitted = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, extra_body={"trl": {"max_length": 64, "evaluation": {"split": 0.25}}}
    )
    job = ended(client, submitted.id, server)
    assert job.status == "succeeded", (job.error, server.log())

    # In two parts, as after a connection that broke.
    step = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id))).step_number
    url = f"{server.url}/v1/fine_tuning/jobs/{job.id}/checkpoints/{step}"
    with httpx2.Client(trust_env=False) as http:
        whole = http.get(f"{url}/content")
        rest = http.get(f"{url}/content", headers={"range": "bytes=5000-", "if-range": whole.headers["etag"]})
        weights = http.get(f"{url}/files/adapter_model.safetensors").content
        manifest = http.get(f"{server.url}/v1/fine_tuning/jobs/{job.id}/manifest").json()
    assert (whole.status_code, rest.status_code) == (200, 206)
    with tarfile.open(fileobj=io.BytesIO(whole.content[:5000] + rest.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / f"checkpoint-{step}"
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    for entry in json.loads((folder / "manifest.json").read_bytes())["checkpoint"]["files"]:
        assert hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    assert manifest["datasets"] == [
        {"role": "training", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert [entry["step"] for entry in manifest["metrics"]["evaluations"]] == [0, step]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(models / MODEL)
    assert PeftModel.from_pretrained(base, folder).active_adapter == "default"
    assert AutoTokenizer.from_pretrained(folder).chat_template

    results = [client.files.retrieve(file_id) for file_id in job.result_files]
    assert [result.filename.rpartition(".")[2] for result in results] == ["csv", "jsonl"]
    assert {result.purpose for result in results} == {"fine-tune-results"}
    lines = [json.loads(line) for line in client.files.content(results[1].id).text.splitlines()]
    losses = [line["loss"] for line in lines if line["type"] == "metrics"]
    assert losses == [manifest["metrics"]["training"]["loss"]]

    assert {model.id for model in client.models.list()} >= {MODEL, job.fine_tuned_model}
    assert client.models.retrieve(job.fine_tuned_model).trl["job_id"] == job.id


def test_a_running_job_is_followed_paged_and_cancelled(client, server):
    """With nothing but OpenAI's client: its own stream reads the events until the job has ended."""
    file = client.files.create(file=("pairs.jsonl", json_lines(PAIRS)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 100_000}}},
        metadata={"test": "cancelled"},
        extra_body={"trl": {"max_length": 64, "saving": {"strategy": "end"}}},
    )
    events = client.get(
        f"/fine_tuning/jobs/{job.id}/events",
        options={"params": {"stream": "true"}},
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
    )
    seen, cancelled = [], None
    for event in events:
        seen.append(event)
        if event.type == "metrics" and cancelled is None:
            cancelled = client.fine_tuning.jobs.cancel(job.id)
            assert (cancelled.status, cancelled.trl["wanted"]) == ("running", "cancel"), server.log()
    assert seen[-1].data["to"] == "cancelled", server.log()
    ended_job = client.fine_tuning.jobs.retrieve(job.id)
    assert (ended_job.status, ended_job.fine_tuned_model, ended_job.result_files) == ("cancelled", None, [])
    assert ended_job.finished_at >= ended_job.created_at
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"  # asking twice is the same as once
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.resume(job.id)
    assert refused.value.code == "transition_refused"

    # Every list by its pages, however small these are.
    assert [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=2)][::-1] == [e.id for e in seen]
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"test": "cancelled"}, limit=1)] == [job.id]
    everything = [found.id for found in client.fine_tuning.jobs.list(limit=100)]
    assert [found.id for found in client.fine_tuning.jobs.list(limit=1)] == everything
    oldest_first = [found.id for found in client.files.list(order="asc", limit=1)]
    assert file.id in oldest_first
    assert [found.id for found in client.files.list()] == oldest_first[::-1]


def test_a_supervised_job_is_trained_and_its_best_checkpoint_is_named(client, server, models):
    file = client.files.create(file=("chat.jsonl", json_lines(chat_rows(8))), purpose="fine-tune")
    submitted = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2, "n_epochs": 1}}},
        extra_body={"trl": {"tuning": "full", "evaluation": {"split": 0.25}}},
    )
    job = ended(client, submitted.id, server)
    assert job.status == "succeeded", (job.error, server.log())
    assert job.method.type == "supervised"
    assert job.trl["resolved"]["learning_rate"] == 2e-5
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.trl["final"]) == (3, True)  # 6 rows, 2 a step
    assert checkpoint.metrics.valid_mean_token_accuracy is not None
    progress = job.trl["progress"]
    assert progress["best"] == {"step": 3, "metric": "eval_loss", "value": checkpoint.metrics.valid_loss}
    assert progress["metrics"]["padding_fraction"] < 1

    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(checkpoint.trl["path"])
    base = AutoModelForCausalLM.from_pretrained(models / MODEL)
    assert any(not weight.equal(other) for weight, other in zip(trained.parameters(), base.parameters(), strict=True))


def test_a_model_that_cannot_be_loaded_fails_its_job_with_the_reason(client, server):
    file = client.files.create(file=("pairs.jsonl", json_lines(PAIRS)), purpose="fine-tune")
    job = ended(client, client.fine_tuning.jobs.create(model=BROKEN, training_file=file.id).id, server)
    assert job.status == "failed"
    assert BROKEN in job.error.message
    assert (job.fine_tuned_model, job.trained_tokens) == (None, None)
    newest = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert (newest.level, newest.data["to"]) == ("error", "failed")
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
