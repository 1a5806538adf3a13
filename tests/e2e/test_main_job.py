"""The main job as a user does it: dataset, DPO, status and artifacts through Llama Stack; the work on the service."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx
import psutil
import pytest
from llama_stack_client import LlamaStackClient

from tests.e2e.conftest import MODEL
from tests.trainer_run import preference_rows

REPOSITORY = Path(__file__).parents[2]
JOB_SECONDS = 180
WITHOUT_REJECTED = {key: value for key, value in preference_rows(1)[0].items() if key != "rejected"}
SETTINGS = {"lr": 1e-3, "batch_size": 2, "seed": 7}


@pytest.fixture(scope="module")
def client(stack):
    with httpx.Client(base_url=stack.url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def service_client(service):
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


def register(client, rows):
    dataset_id = f"pairs-{uuid.uuid4().hex}"
    body = {"dataset_id": dataset_id, "purpose": "post-training/messages", "source": {"type": "rows", "rows": rows}}
    client.post("/v1beta/datasets", json=body).raise_for_status()
    return dataset_id


def preference_optimize(dataset_id, *, model=MODEL, job_uuid=None, extras=None, **training):
    return {
        "job_uuid": job_uuid or f"job-{uuid.uuid4().hex}",
        "finetuned_model": model,
        "algorithm_config": {"beta": 0.1, "loss_type": "sigmoid"},
        "training_config": {
            "n_epochs": 1,
            "data_config": {
                "dataset_id": dataset_id,
                "batch_size": SETTINGS["batch_size"],
                "shuffle": True,
                "data_format": "dialog",
            },
            "optimizer_config": {
                "optimizer_type": "adamw",
                "lr": SETTINGS["lr"],
                "weight_decay": 0.01,
                "num_warmup_steps": 1,
            },
            **training,
        },
        "hyperparam_search_config": {"seed": SETTINGS["seed"], **(extras or {})},
        "logger_config": {},
    }


def submit(client, body):
    answer = client.post("/v1alpha/post-training/preference-optimize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["job_uuid"]


def status_of(client, job):
    answer = client.get(f"/v1alpha/post-training/jobs/{job}/status")
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_until(client, job, reached, service):
    deadline = time.monotonic() + JOB_SECONDS
    while not reached(status := status_of(client, job)):
        assert time.monotonic() < deadline, f"{status}\n{service.log()}"
        time.sleep(0.1)
    return status


def ended(status):
    return status["status"] in ("completed", "failed", "cancelled")


def events(service_client, service_job):
    answer = service_client.get(f"/v1/fine_tuning/jobs/{service_job}/events", params={"order": "asc", "limit": 100})
    return [event["data"] for event in answer.raise_for_status().json()["data"]]


def stored_files(service_client):
    return [file["id"] for file in service_client.get("/v1/files").raise_for_status().json()["data"]]


def test_a_job_through_the_stack_trains_as_a_plain_trl_script_does(client, service_client, service, models, tmp_path):
    rows = preference_rows(8)
    held_out = preference_rows(12)[8:]
    body = preference_optimize(register(client, rows))
    body["training_config"]["data_config"]["validation_dataset_id"] = register(client, held_out)
    job = submit(client, body)
    status = wait_until(client, job, ended, service)
    details = status["resources_allocated"]
    assert status["status"] == "completed", (details["error"], service.log())

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "examples" / "dpo_script.py",
            models / MODEL,
            data,
            *("--learning-rate", str(SETTINGS["lr"]), "--batch-size", str(SETTINGS["batch_size"])),
            *("--seed", str(SETTINGS["seed"])),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [json.loads(line) for line in script.stdout.splitlines() if line.startswith("{")]
    expected = {line["step"]: line for line in printed if "loss" in line}
    trained = [event for event in events(service_client, details["service_job_id"]) if event["type"] == "metrics"]
    assert [event["step"] for event in trained] == [1, 2, 3, 4] == list(expected)
    for event in trained:
        for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert event[name] == pytest.approx(expected[event["step"]][name], abs=1e-5), (event["step"], name)

    assert details["progress"]["step"] == details["progress"]["total_steps"] == 4
    assert details["baseline"]["eval_rewards/margins"] == 0
    assert details["evaluation"]["eval_rewards/margins"] != 0
    assert status["started_at"] <= status["completed_at"]
    artifacts = client.get(f"/v1alpha/post-training/jobs/{job}/artifacts").raise_for_status().json()
    (checkpoint,) = artifacts["checkpoints"]
    assert checkpoint["post_training_job_id"] == job
    assert (Path(checkpoint["path"]) / "adapter_model.safetensors").is_file()
    assert {"job_uuid": job} in client.get("/v1alpha/post-training/jobs").raise_for_status().json()["data"]


def test_a_running_and_a_queued_job_are_cancelled(client, service):
    dataset = register(client, preference_rows(8))
    running, queued = (submit(client, preference_optimize(dataset, n_epochs=5000)) for _ in range(2))
    wait_until(client, running, lambda s: s["resources_allocated"]["progress"]["step"] > 0, service)
    assert status_of(client, queued)["status"] == "scheduled"
    assert status_of(client, queued)["resources_allocated"]["queue_position"] == 1
    for job in (queued, running):
        assert client.post(f"/v1alpha/post-training/jobs/{job}/cancel").status_code == 200
        assert wait_until(client, job, ended, service)["status"] == "cancelled"


def test_a_trainer_that_dies_gives_a_failed_job_with_the_reason_and_the_logs_tail(client, service):
    job = submit(client, preference_optimize(register(client, preference_rows(8)), n_epochs=5000))
    wait_until(client, job, lambda s: s["resources_allocated"]["progress"]["step"] > 0, service)
    (trainer,) = [
        process
        for process in psutil.Process(service.process.pid).children(recursive=True)
        if "bento_service.training" in process.cmdline()
    ]
    os.kill(trainer.pid, signal.SIGKILL)
    status = wait_until(client, job, ended, service)
    assert status["status"] == "failed"
    error = status["resources_allocated"]["error"]
    assert error["code"] == "trainer_died"
    assert "SIGKILL" in error["message"] and "The log ends with" in error["message"]


def test_the_official_client_of_the_release_submits_and_lists(client, stack, service):
    dataset = register(client, preference_rows(4))
    body = preference_optimize(dataset)
    with LlamaStackClient(base_url=stack.url) as official:
        job = official.alpha.post_training.preference_optimize(**body)
        assert job.job_uuid == body["job_uuid"]
        wait_until(client, job.job_uuid, ended, service)
        assert job.job_uuid in [listed.job_uuid for listed in official.alpha.post_training.job.list()]


@pytest.mark.parametrize(
    ("rows", "changes", "status", "words"),
    [
        (preference_rows(3), {"model": "org/nowhere"}, 400, ["org/nowhere", "org/tiny"]),
        ([*preference_rows(2), WITHOUT_REJECTED], {}, 400, ["row 3", "rejected"]),
        ([], {}, 400, ["is empty"]),
        (preference_rows(3), {"extras": {"dpo": {"betta": 1}}}, 400, ["betta"]),
    ],
    ids=["unknown model", "row without rejected", "empty dataset", "unknown extra"],
)
def test_bad_input_is_answered_at_once_and_nothing_stays(client, service_client, rows, changes, status, words):
    dataset = register(client, rows)
    before = stored_files(service_client)
    body = preference_optimize(dataset, **changes)
    answer = client.post("/v1alpha/post-training/preference-optimize", json=body)
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.text
    assert stored_files(service_client) == before
    assert client.get(f"/v1alpha/post-training/jobs/{body['job_uuid']}/status").status_code == 404


def test_a_job_uuid_is_one_job(client, service, service_client):
    dataset = register(client, preference_rows(4))
    body = preference_optimize(dataset)
    submit(client, body)
    submit(client, body)
    other = preference_optimize(dataset, job_uuid=body["job_uuid"], n_epochs=3)
    answer = client.post("/v1alpha/post-training/preference-optimize", json=other)
    assert answer.status_code == 409
    assert body["job_uuid"] in answer.text
    found = service_client.get("/v1/fine_tuning/jobs", params={"client_id": body["job_uuid"]}).json()["data"]
    assert len(found) == 1
    wait_until(client, body["job_uuid"], ended, service)
