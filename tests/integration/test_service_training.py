"""One job all the way: uploaded, submitted and trained by a real service with OpenAI's client, on a tiny model."""

import time
from pathlib import Path

import httpx2
import openai
import pytest

from tests.bento_server import bento_server
from tests.core_factory import PAIRS, json_lines
from tests.tiny_model import make_tiny_model

MODEL = "org/tiny-trained"
BROKEN = "org/without-weights"
TRAINING_SECONDS = 180


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    make_tiny_model(models / MODEL)
    (models / BROKEN).mkdir()
    (models / BROKEN / "config.json").write_text('{"model_type": "llama"}')
    with bento_server(tmp_path_factory.mktemp("service"), models=models) as server:
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


def test_a_job_is_trained_and_followed(client, server):
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


def test_a_model_that_cannot_be_loaded_fails_its_job_with_the_reason(client, server):
    file = client.files.create(file=("pairs.jsonl", json_lines(PAIRS)), purpose="fine-tune")
    job = ended(client, client.fine_tuning.jobs.create(model=BROKEN, training_file=file.id).id, server)
    assert job.status == "failed"
    assert BROKEN in job.error.message
    assert (job.fine_tuned_model, job.trained_tokens) == (None, None)
    newest = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert (newest.level, newest.data["to"]) == ("error", "failed")
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
