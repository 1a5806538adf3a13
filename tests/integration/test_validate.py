"""Validating tells what submitting would, and what the job then does; nothing is stored, no process stays behind."""

import threading
import time

import httpx
import psutil
import pytest

from bento_service.errors import Overloaded
from tests.bento_server import bento_server
from tests.core_factory import MODEL, PAIRS, core, json_lines, request, upload
from tests.tiny_model import make_tiny_model

SECONDS = 180


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    make_tiny_model(models / MODEL)
    return models


def previews():
    """Preview processes of this process."""
    return [child for child in psutil.Process().children() if "bento_service.training.preview" in child.cmdline()]


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_validated_and_then_trained_with_the_same_steps_and_tokens(models, tmp_path):
    long = {"prompt": "What is the capital of France? " * 30, "chosen": "Paris.", "rejected": "No."}
    with (
        bento_server(tmp_path, models=models) as server,
        httpx.Client(base_url=f"{server.url}/v1", trust_env=False, timeout=SECONDS) as client,
    ):
        data = json_lines([*PAIRS * 4, long])
        file = client.post(
            "/files", data={"purpose": "fine-tune"}, files={"file": ("pairs.jsonl", data)}
        ).raise_for_status()
        body = {
            "model": MODEL,
            "training_file": file.json()["id"],
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 2, "n_epochs": 2}}},
            "trl": {"max_length": 64},
        }
        found = client.post("/fine_tuning/jobs/validate", json=body).raise_for_status().json()
        assert (found["valid"], found["errors"]) == (True, [])
        assert (found["training_file"]["rows"], found["training_file"]["format"]) == (9, "text")
        assert (found["training_tokens"]["left_out"], found["training_tokens"]["sample"]) == (1, False)
        assert found["run"]["steps"] == 8
        assert found["resolved"]["learning_rate"] == pytest.approx(1e-5)
        assert str(server.home) not in str(found)
        memory = found["memory"]
        assert memory["fits"] is True
        assert 0 < memory["weights"] + memory["activations"] < memory["total"] < memory["device"]
        assert found["disk"]["fits"] is True
        assert client.get("/fine_tuning/jobs").json()["data"] == []

        job = client.post("/fine_tuning/jobs", json=body).raise_for_status().json()
        wait_until(
            lambda: client.get(f"/fine_tuning/jobs/{job['id']}").json()["status"] in ("succeeded", "failed"),
        )
        ended = client.get(f"/fine_tuning/jobs/{job['id']}").json()
        assert ended["status"] == "succeeded", server.log()
        assert ended["trl"]["progress"]["total_steps"] == found["run"]["steps"]
        assert ended["trained_tokens"] == found["run"]["tokens"]


def test_all_that_is_wrong_is_said_at_once_and_each_error_is_what_submitting_says(models, tmp_path):
    with core(tmp_path, models_dir=models) as impl:
        bad = upload(impl, [*PAIRS, {"prompt": "p", "chosen": "c"}])
        wanted = request(bad.id, suffix="a/b", options={"devices": 7})
        found = impl.rehearse(wanted, threading.Event())
        assert [(refusal.param, refusal.code) for refusal in found.refusals] == [
            ("suffix", "invalid_request"),
            ("trl.devices", "resources_exceeded"),
            ("training_file", "invalid_dataset"),
        ]
        assert found.preview.training["problems"][0]["row"] == 3
        with pytest.raises(Exception, match="suffix") as caught:
            impl.submit(wanted)
        assert caught.value.message == found.refusals[0].message
        absent = impl.rehearse(request("file-absent", model="org/absent"), threading.Event())
        assert {refusal.param for refusal in absent.refusals} == {"training_file", "model"}
        assert absent.spec is None


def test_one_at_a_time_and_ended_when_nobody_waits(models, tmp_path):
    with core(tmp_path, models_dir=models, max_validations=1) as impl:
        wanted = request(upload(impl).id)
        cancelled = threading.Event()
        refused = []

        def first():
            try:
                impl.rehearse(wanted, cancelled)
            except Overloaded as error:
                refused.append(error.message)

        thread = threading.Thread(target=first)
        thread.start()
        wait_until(previews)
        with pytest.raises(Overloaded, match="TRL_MAX_VALIDATIONS"):
            impl.rehearse(wanted, threading.Event())
        cancelled.set()
        thread.join(SECONDS)
        assert previews() == []
        assert "cancelled" in refused[0]


def test_a_preview_that_is_killed_is_an_error_to_try_again(models, tmp_path):
    with core(tmp_path, models_dir=models) as impl:
        wanted = request(upload(impl).id)
        refused = []

        def first():
            try:
                impl.rehearse(wanted, threading.Event())
            except Overloaded as error:
                refused.append(error.message)

        thread = threading.Thread(target=first)
        thread.start()
        wait_until(previews)
        previews()[0].kill()
        thread.join(SECONDS)
        assert "-9" in refused[0]
